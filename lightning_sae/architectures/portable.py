"""SAEs in portable folders: safetensors and JSON that act on raw activations."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_sae.files import write_atomically
from lightning_sae.functional.penalties import from_description, plain_arguments
from lightning_sae.version import __version__

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
FORMAT = 1


@runtime_checkable
class Portable(Protocol):
    """What this file asks of an SAE; see `SparseAutoencoder`."""

    input_mean: Tensor
    input_scale: Tensor
    latent_units: tuple[str, ...]
    input_units: tuple[str, ...]
    apply_b_dec_to_input: bool
    d_sae: int
    source: dict[str, Any]
    is_trained: bool

    @property
    def W_enc(self) -> Tensor:
        """The encoder, [d_in, d_sae]."""

    @property
    def hparams(self) -> Any:
        """The arguments with which it was built."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    def activate(self, pre: Tensor) -> Tensor:
        """Latents from pre-activations."""

    def shift_pre_activations(self, state: dict[str, Tensor], by: Tensor) -> None:
        """Change biases in a folded state so that all pre-activations change by so much."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Its weights."""

    def named_buffers(self) -> Iterable[tuple[str, Tensor]]:
        """Its buffers."""


def save_pretrained(sae: Portable, folder: Path) -> Path:
    """Write `sae` to a new folder; see `SparseAutoencoder.save_pretrained`."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"Expected argument `folder` to be new or empty but {folder} holds files: "
            "choose another folder, or move them away."
        )
    weights = {name: w.cpu() for name, w in folded_state(sae).items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path))
    text = json.dumps(_description(sae), indent=2, sort_keys=True)
    write_atomically(folder / CONFIG, lambda path: path.write_text(text + "\n"))
    return folder


@torch.no_grad()
def folded_state(sae: Portable) -> dict[str, Tensor]:
    """Weights that act on raw activations, with centring and scaling worked in.

    With s the scale and m the mean: `b_dec' = b_dec / s + m`, `b_enc' = b_enc / s`, less
    `m @ W_enc` where the encoder does not subtract `b_dec`; thresholds and other weights in the
    units of the latents are divided by s too. The directions stay as they are.

    This is exact if latents scale with their pre-activations and these weights. Where a subclass's
    own `activate` does not, centring and scaling are kept beside the weights instead.
    """
    tensors = {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
    names = {name for name, _ in sae.named_parameters()}
    names |= {*sae.latent_units, *sae.input_units}
    state = {name: tensors[name] for name in names}
    if _activates_in_proportion(sae):
        state |= {name: state[name] / sae.input_scale for name in sae.latent_units}
        if not sae.apply_b_dec_to_input:
            sae.shift_pre_activations(state, -sae.input_mean @ sae.W_enc)
        points = {name: state[name] / sae.input_scale + sae.input_mean for name in sae.input_units}
        state |= points
    else:
        state |= {"input_mean": sae.input_mean, "input_scale": sae.input_scale}
    return {name: w.detach().clone().contiguous() for name, w in state.items()}


@torch.no_grad()
def adopt_scaling(sae: Portable, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
    """Change an SAE's centring and scaling and nothing else; see `SparseAutoencoder.adopt_scaling`.

    The opposite of `folded_state`, with whose weights it begins.
    """
    mean, scale = mean.to(sae.input_mean), scale.to(sae.input_scale)
    same = torch.equal(mean, sae.input_mean) and torch.equal(scale, sae.input_scale)
    if same or not _activates_in_proportion(sae):
        return
    state = folded_state(sae)
    if not sae.apply_b_dec_to_input:
        sae.shift_pre_activations(state, mean @ sae.W_enc)
    own = {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
    for name in sae.latent_units:
        own[name].copy_(state[name] * scale)
    for name in sae.input_units:
        own[name].copy_((state[name] - mean) * scale)
    sae.input_mean.copy_(mean)
    sae.input_scale.copy_(scale)


def _activates_in_proportion(sae: Portable) -> bool:
    if type(sae).activate.__module__.startswith("lightning_sae.architectures."):
        return True
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-4, 2, 256).unsqueeze(-1)
    pre = (sizes * torch.randn(256, sae.d_sae, generator=generator)).to(sae.device)
    scaled = sae.activate(pre / sae.input_scale)
    return torch.allclose(sae.activate(pre) / sae.input_scale, scaled, rtol=1e-4, atol=1e-6)


def _description(sae: Portable) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "architecture": type(sae).__name__,
        "arguments": arguments_of(sae.hparams),
        "source": sae.source,
        "versions": {"lightning_sae": __version__, "torch": torch.__version__},
    }


def arguments_of(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an SAE as plain values, without what Lightning notes for itself."""
    return {k: v for k, v in plain_arguments(hparams).items() if not k.startswith("_")}


def penalty_of(checkpoint: Any) -> dict[str, Any]:
    """The argument `penalty` that a checkpoint's file has, if it has one, as an object."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    description = saved.get("hyper_parameters", {}).get("penalty")
    return {} if description is None else {"penalty": from_description(description)}


S = TypeVar("S", bound=nn.Module)


def read(path: Path, *architectures: type[S]) -> S:
    """Read a folder that `save_pretrained` wrote, as the one of these classes that it names.

    Raises:
        ValueError: If there is no SAE at `path`, or it is of none of these classes.
    """
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ValueError(
            f"Expected argument `path` to be a folder with {CONFIG} and {WEIGHTS}, or a .ckpt "
            f"file, but got {path}: give a folder that `save_pretrained` wrote."
        )
    description = json.loads((path / CONFIG).read_text())
    return build(description, load_file(path / WEIGHTS), *architectures)


def build(description: dict[str, Any], weights: dict[str, Tensor], *architectures: type[S]) -> S:
    """The SAE of a description and its weights, in evaluation mode.

    Args:
        description: `architecture`, `arguments` and `source`.
        weights: By name.
        architectures: The classes that it may be of.

    Raises:
        ValueError: If it is of none of these classes, or weights are missing or too many.
    """
    named = description["architecture"]
    known = {architecture.__name__: architecture for architecture in architectures}
    if named not in known:
        raise ValueError(
            f"Expected an SAE of architecture {' or '.join(f'`{name}`' for name in known)} but the "
            f"file holds `{named}`: load it with that class, `{named}.from_pretrained(path)`."
        )
    arguments: dict[str, Any] = description["arguments"]
    # JSON knows no tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if arguments.get("penalty"):
        arguments["penalty"] = from_description(arguments["penalty"])
    sae: Any = known[named](**arguments)
    missing, unexpected = sae.load_state_dict(weights, strict=False)
    missing = sorted(set(missing) - dict(sae.named_buffers()).keys())  # a folded SAE needs none
    if unexpected or missing:
        raise ValueError(f"The weights lack {missing} and have {unexpected} too many.")
    sae.source, sae.is_trained = description["source"], True
    return sae.eval()
