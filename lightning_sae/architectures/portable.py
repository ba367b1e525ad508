"""SAEs in portable folders: safetensors and JSON that act on raw activations."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from lightning_sae.checkpoints import read_checkpoint
from lightning_sae.checks import expect, require_new_folder, require_types
from lightning_sae.distributed.parts import Parts
from lightning_sae.distributed.undrawn import leave_undrawn
from lightning_sae.files import first_line, read_json, write_atomically, written_whole
from lightning_sae.functional.penalties import from_description, plain_arguments
from lightning_sae.tensors import not_finite
from lightning_sae.version import __version__

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
FORMAT = 1


class Portable(LightningModule, ABC):
    """What this file asks of an SAE; see `SparseAutoencoder`."""

    W_enc: Tensor
    input_mean: Tensor
    input_scale: Tensor
    latent_units: tuple[str, ...]
    input_units: tuple[str, ...]
    apply_b_dec_to_input: bool
    d_sae: int
    source: dict[str, Any]
    is_trained: bool
    n_trained: int
    parts: Parts

    @abstractmethod
    def latent_axes(self) -> dict[str, int]:
        """The axis of the latents, by name, of the tensors that have one."""

    @abstractmethod
    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Latents from pre-activations."""

    def shift_pre_activations(self, state: dict[str, Tensor], by: Float[Tensor, " d_sae"]) -> None:
        """Change biases in a folded state so that pre-activations change by `by`."""
        state["b_enc"] = state["b_enc"] + by


def save_pretrained(sae: Portable, folder: Path) -> Path:
    """Write `sae` to a new folder; see `SparseAutoencoder.save_pretrained`."""
    state = _whole_state(sae)
    if state is None:
        return folder
    require_new_folder("folder", folder)
    if any(weight.is_meta for weight in state.values()):
        raise ValueError(
            f"The SAE is not written to {folder}, for its weights have no values: they are on the "
            "device `meta`."
        )
    weights = {name: w.cpu() for name, w in state.items()}
    bad = not_finite(weights, dict(sae.named_buffers()))
    if bad:
        raise ValueError(
            f"The SAE is not written to {folder}, for its weights are not finite "
            f"({', '.join(bad)}): lower `lr`, from an earlier checkpoint on if there is one."
        )
    with written_whole(folder) as new:
        write_atomically(new / WEIGHTS, lambda path: save_file(weights, path))
        content = described(sae)
        content["checksums"] = _checksums(new, content)
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(new / CONFIG, lambda path: path.write_text(text + "\n"))
    return folder


def _whole_state(sae: Portable) -> dict[str, Tensor] | None:
    """The folded weights of all parts; None where another process writes them."""
    state = folded_state(sae)
    if sae.parts.n == 1:
        return state
    axes, whole = sae.latent_axes(), {}
    for name, own in sorted(state.items()):  # in the same order on all devices
        whole[name] = sae.parts.whole(own, axes[name]) if name in axes else own
    if distributed.get_rank() > 0:
        return None
    return {name: w.contiguous() for name, w in whole.items() if w is not None}


def _checksums(folder: Path, description: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the weights' file, as `sha256sum` has it, and of the rest of the description."""
    rest = {name: value for name, value in description.items() if name != "checksums"}
    text = json.dumps(rest, sort_keys=True)
    with (folder / WEIGHTS).open("rb") as file:
        weights = sha256()
        while block := file.read(2**20):
            weights.update(block)
    return {WEIGHTS: weights.hexdigest(), CONFIG: sha256(text.encode()).hexdigest()}


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
    pre = (sizes * torch.randn(256, sae.W_enc.shape[1], generator=generator)).to(sae.device)
    scaled = sae.activate(pre / sae.input_scale)
    return torch.allclose(sae.activate(pre) / sae.input_scale, scaled, rtol=1e-4, atol=1e-6)


def described(sae: Portable) -> dict[str, Any]:
    """What a folder says of an SAE, besides checksums."""
    training = {"training": {"activations": sae.n_trained}} if sae.n_trained else {}
    return {
        **training,
        "format": FORMAT,
        "architecture": type(sae).__name__,
        "arguments": arguments_of(sae.hparams),
        "source": sae.source,
        "versions": {"lightning_sae": __version__, "torch": torch.__version__},
    }


def arguments_of(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an SAE as plain values, without what Lightning notes for itself."""
    return {k: v for k, v in plain_arguments(hparams).items() if not k.startswith("_")}


def require_sound(checkpoint: Any, given: Mapping[str, Any]) -> None:
    """Raise a ValueError if a checkpoint's file is damaged, or of other sizes than it says.

    Args:
        checkpoint: The file's path; the content of an open file is not checked.
        given: Arguments that replace those of the file.
    """
    if not isinstance(checkpoint, str | Path):
        expect(hasattr(checkpoint, "read"), "checkpoint_path", "a path or a file", repr(checkpoint))
        return
    needed = "state_dict", "hyper_parameters", "lightning_sae"
    content = read_checkpoint(checkpoint, needed=needed)
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"Could not read {checkpoint}: it lacks {', '.join(missing)}.")
    arguments = {**content["hyper_parameters"], **given}
    found = content["state_dict"].get("W_dec", torch.empty(0)).shape
    said = tuple(arguments.get(name) for name in ("d_sae", "d_in"))
    if None not in said and said != tuple(found):  # before memory is taken
        raise ValueError(
            f"Could not read {checkpoint}: by its arguments (d_sae, d_in) are {said} but `W_dec` "
            f"has shape {tuple(found)}."
        )


def penalty_of(checkpoint: Any) -> dict[str, Any]:
    """The argument `penalty` that a checkpoint's file has, if it has one, as an object."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    description = saved.get("hyper_parameters", {}).get("penalty")
    return {} if description is None else {"penalty": from_description(description)}


S = TypeVar("S", bound=nn.Module)

ENTRIES = {
    "format": int,
    "architecture": str,
    "arguments": dict,
    "source": dict,
    "versions": dict,
    "training": dict,
    "checksums": dict,
}
"""What a description holds, by type."""
OPTIONAL = {"training", "checksums"}
"""What may be missing, as it once was."""


def read(path: Path, *architectures: type[S]) -> S:
    """Read a folder that `save_pretrained` wrote, as the one of these classes that it names.

    Raises:
        ValueError: If there is no SAE at `path`, it is damaged, or of none of these classes.
    """
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ValueError(
            f"Expected argument `path` to be a folder with {CONFIG} and {WEIGHTS}, or a .ckpt "
            f"file, but got {path}: give a folder that `save_pretrained` wrote."
        )
    description = read_json(path / CONFIG)
    _require_format(description, path / CONFIG)
    weights = _read_weights(path / WEIGHTS)
    # The size and the names first: they say more than that a checksum differs.
    require_fit(description, weights, path / CONFIG, *architectures)
    _require_checksums(description, path)
    return build(description, weights, path / CONFIG, *architectures)


def _require_format(description: Any, path: Path) -> None:
    if not isinstance(description, dict):
        raise _refusal(path, f"it holds a {type(description).__name__}, not a description")
    missing = ENTRIES.keys() - description.keys() - OPTIONAL
    unknown = description.keys() - ENTRIES.keys()
    if missing or unknown:
        raise _refusal(path, f"it lacks {sorted(missing)} and has {sorted(unknown)} too many")
    require_entries(description, path)
    counted = description.get("training", {}).get("activations", 0)
    if isinstance(counted, bool) or not isinstance(counted, int) or counted < 0:
        raise _refusal(path, f"its `training.activations` is {counted!r:.40}, and not a count")
    found = description["format"]
    if found != FORMAT:
        remedy = "a newer version of lightning-sae may read it"
        raise _refusal(path, f"its `format` is {found} and this version reads {FORMAT}: {remedy}")


def require_entries(description: dict[str, Any], path: Path) -> None:
    """Raise a ValueError about the file at `path` if an entry is of a wrong type."""
    for name, value in description.items():
        kind = ENTRIES[name]
        if type(value) is not kind:
            raise _refusal(path, f"its `{name}` is {value!r:.40} and no {kind.__name__}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # of many kinds, as a damaged header may say anything
        raise _refusal(path, f"it is damaged ({first_line(error)})") from error


def _require_checksums(description: dict[str, Any], folder: Path) -> None:
    if "checksums" not in description:  # of a version that wrote none
        return
    for name, own in _checksums(folder, description).items():
        if description["checksums"].get(name) != own:
            remedy = (
                f"if you changed it yourself, delete `checksums` in {CONFIG}, and nothing is "
                "compared any more"
            )
            raise _refusal(folder / name, f"it is not what was written (its checksum): {remedy}")


def _refusal(path: Path, reason: str) -> ValueError:
    return ValueError(f"Could not read {path}: {reason}.")


def build(
    description: dict[str, Any], weights: dict[str, Tensor], of: Path, *architectures: type[S]
) -> S:
    """The SAE of a description and its weights, in evaluation mode and in the weights' dtypes.

    Args:
        description: `architecture`, `arguments` and `source`.
        weights: By name.
        of: The file with the description, for messages.
        architectures: The classes that it may be of.

    Raises:
        ValueError: If it is of none of these classes, or the weights do not fit or are not finite.
    """
    require_fit(description, weights, of, *architectures)
    sae: Any = _made(description, of, *architectures)
    leave_undrawn(sae)
    bad = not_finite(weights, dict(sae.named_buffers()))
    if bad:
        raise _refusal(of, f"its weights are not finite ({', '.join(bad)})")
    sae.to(weights["W_dec"].dtype)
    for name, own in _tensors(sae).items():  # a threshold may have more digits
        if name in weights and own.is_floating_point():
            own.data = own.data.to(weights[name].dtype)
    sae.load_state_dict(weights, strict=False)
    sae.source, sae.is_trained = description["source"], True
    sae.n_trained = description.get("training", {}).get("activations", 0)
    return sae.eval()


def require_fit(
    description: dict[str, Any],
    weights: dict[str, Tensor],
    of: Path,
    *architectures: type[nn.Module],
) -> None:
    """Raise a ValueError unless weights are those of the SAE described, without making it.

    On the `meta` device a tensor has a shape and no memory, so that absurd sizes cost nothing.
    """
    with torch.device("meta"):
        sae: Any = _made(description, of, *architectures)
    expected = _tensors(sae)
    # Of the buffers, a folded SAE needs those that were folded.
    needed = {name for name, _ in sae.named_parameters()} | {*sae.latent_units, *sae.input_units}
    missing, unexpected = sorted(needed - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise _refusal(of, f"the weights lack {missing} and have {unexpected} too many")
    for name, weight in weights.items():
        own = expected[name]
        if weight.shape != own.shape:
            raise _refusal(
                of,
                f"by its `arguments` (d_in={sae.d_in}, d_sae={sae.d_sae}) the shape of {name} is "
                f"{tuple(own.shape)} but the weights have {tuple(weight.shape)}",
            )
        if weight.dtype != own.dtype and not (own.is_floating_point() and weight.dtype in FLOATS):
            raise _refusal(of, f"{name} is of dtype {weight.dtype} and not {own.dtype}")


FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
"""The dtypes that weights may have."""


def _made(description: dict[str, Any], of: Path, *architectures: type[nn.Module]) -> nn.Module:
    """An SAE with new weights."""
    named = description["architecture"]
    known = {architecture.__name__: architecture for architecture in architectures}
    if named not in known:
        raise ValueError(
            f"Expected an SAE of architecture {' or '.join(f'`{name}`' for name in known)} but the "
            f"file holds `{named}`: load it with that class, `{named}.from_pretrained(path)`. "
            f"({of})"
        )
    # JSON knows no tuples.
    given: dict[str, Any] = description["arguments"]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        if given.get("penalty") is not None:
            expect(isinstance(given["penalty"], dict), "penalty", "a class", repr(given["penalty"]))
            given["penalty"] = from_description(given["penalty"])
        require_types(known[named], given)
        return known[named](**given)
    except Exception as error:  # an argument of a wrong type may raise any
        raise _refusal(of, f"its `arguments` give no {named}: {first_line(error)}") from error


def _tensors(sae: nn.Module) -> dict[str, Tensor]:
    return {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
