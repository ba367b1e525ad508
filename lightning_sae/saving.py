"""SAEs on disk: portable folders, and Lightning checkpoints that survive a full disk."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typing_extensions import override

from lightning_sae import architectures
from lightning_sae.architectures.base import SAE, SparseAutoencoder
from lightning_sae.functional.penalties import from_description, plain_arguments
from lightning_sae.version import __version__

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
FORMAT = 1


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary neighbour of `path`, then put that in the place of `path`.

    Whatever happens, `path` is either what it was or complete.

    Raises:
        OSError: If writing fails, for instance on a full disk; says what became of the old file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # as if opened in the ordinary way
        _flush_to_disk(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap ENOSPC
        kept = f"the earlier {path.name} is intact" if path.exists() else "nothing was written"
        raise OSError(f"Could not write {path}: {error}; {kept}. Free some disk space.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside the old file and then put in its place."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint`; a failure leaves an existing file at `path` as it was."""
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only, unless told otherwise: a pickle can run code."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def save_pretrained(sae: SparseAutoencoder, folder: Path) -> Path:
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
def folded_state(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
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
def adopt_scaling(
    sae: SparseAutoencoder, mean: Float[torch.Tensor, " d_in"], scale: Float[torch.Tensor, ""]
) -> None:
    """Change an SAE's centring and scaling and nothing else; see `Saved.adopt_scaling`.

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


def _activates_in_proportion(sae: SparseAutoencoder) -> bool:
    if type(sae).activate.__module__.startswith("lightning_sae.architectures."):
        return True
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-4, 2, 256).unsqueeze(-1)
    pre = (sizes * torch.randn(256, sae.d_sae, generator=generator)).to(sae.device)
    scaled = sae.activate(pre / sae.input_scale)
    return torch.allclose(sae.activate(pre) / sae.input_scale, scaled, rtol=1e-4, atol=1e-6)


def _description(sae: SparseAutoencoder) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "architecture": type(sae).__name__,
        "arguments": _arguments(sae.hparams),
        "source": sae.source,
        "versions": {"lightning_sae": __version__, "torch": torch.__version__},
    }


def _arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    # Without what Lightning notes for itself.
    return {k: v for k, v in plain_arguments(hparams).items() if not k.startswith("_")}


@overload
def load(path: str | Path, *, member: str | None = None) -> SparseAutoencoder: ...
@overload
def load(path: str | Path, architecture: type[SAE], member: str | None = None) -> SAE: ...
def load(
    path: str | Path,
    architecture: type[SparseAutoencoder] | None = None,
    member: str | None = None,
) -> SparseAutoencoder:
    """Read an SAE from a portable folder or a Lightning checkpoint, ready for raw activations.

    Args:
        path: A folder that `save_pretrained` wrote, or a `.ckpt` file of a training run.
        architecture: Class to build; by default the one of this package that the file names.
        member: Which one, in a checkpoint of several side by side.

    Returns:
        The SAE in evaluation mode; `sae.source` names its model and hook.

    Raises:
        ValueError: If there is no SAE at `path`, or it needs another class.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return _load_checkpoint(path, architecture, member)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ValueError(
            f"Expected argument `path` to be a folder with {CONFIG} and {WEIGHTS}, or a .ckpt "
            f"file, but got {path}: give a folder that `save_pretrained` wrote."
        )
    description = json.loads((path / CONFIG).read_text())
    weights = load_file(path / WEIGHTS)
    return _build(description, weights, architecture)


def _load_checkpoint(
    path: Path, architecture: type[SparseAutoencoder] | None, member: str | None
) -> SparseAutoencoder:
    if not path.is_file():
        raise ValueError(f"Expected argument `path` to be an SAE but {path} does not exist.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "members" in checkpoint:
        checkpoint = _of_member(checkpoint, member)
    if "lightning_sae" not in checkpoint:
        raise ValueError(
            f"Expected argument `path` to hold an SAE but {path} holds something else."
        )
    arguments = _arguments(checkpoint["hyper_parameters"])
    description = {**checkpoint["lightning_sae"], "arguments": arguments}
    return _build(description, checkpoint["state_dict"], architecture)


def _of_member(checkpoint: dict[str, Any], member: str | None) -> dict[str, Any]:
    """What a checkpoint of the member alone would hold of its SAE."""
    names = [own["name"] for own in checkpoint["members"]]
    if member not in names:
        raise ValueError(
            f"Expected argument `member` to be one of {', '.join(names)}, for the checkpoint is of "
            f"several SAEs, but got {member}."
        )
    place = names.index(member)
    prefix, weights = f"saes.{place}.", checkpoint["state_dict"]
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return {**checkpoint["members"][place], "state_dict": own}


def _build(
    description: dict[str, Any],
    weights: dict[str, torch.Tensor],
    architecture: type[SparseAutoencoder] | None,
) -> SparseAutoencoder:
    named = description["architecture"]
    if architecture is None:
        if named not in architectures.__all__:
            raise ValueError(
                f"Expected an architecture of this package but got `{named}`: "
                f"call `{named}.from_pretrained(path)` on your own class."
            )
        architecture = getattr(architectures, named)
    elif architecture.__name__ != named:
        raise ValueError(
            f"Expected an SAE of architecture `{architecture.__name__}` but the file holds "
            f"`{named}`: load it with that class."
        )
    arguments: dict[str, Any] = description["arguments"]
    # JSON knows no tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if arguments.get("penalty"):
        arguments["penalty"] = from_description(arguments["penalty"])
    sae = architecture(**arguments)
    missing, unexpected = sae.load_state_dict(weights, strict=False)
    missing = sorted(set(missing) - dict(sae.named_buffers()).keys())  # a folded SAE needs none
    if unexpected or missing:
        raise ValueError(f"The weights lack {missing} and have {unexpected} too many.")
    sae.source, sae.is_trained = description["source"], True
    return sae.eval()
