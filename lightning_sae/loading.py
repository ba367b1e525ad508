"""`load`: read an SAE from files. The only module that knows all architectures and formats."""

from pathlib import Path
from typing import Any, overload

import torch

from lightning_sae import architectures, interop
from lightning_sae.architectures.base import SAE, SparseAutoencoder
from lightning_sae.architectures.hub import on_disk
from lightning_sae.architectures.portable import (
    FLOATS,
    arguments_of,
    build,
    read,
    require_entries,
)
from lightning_sae.checkpoints import read_checkpoint
from lightning_sae.checks import expect
from lightning_sae.files import first_line

NEEDED = ("state_dict", "hyper_parameters", "lightning_sae", "members")
"""Entries of a checkpoint that an SAE needs."""


@overload
def load(
    path: str | Path,
    *,
    member: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    format: str | None = None,
) -> SparseAutoencoder: ...
@overload
def load(
    path: str | Path,
    architecture: type[SAE],
    member: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    format: str | None = None,
) -> SAE: ...
def load(
    path: str | Path,
    architecture: type[SparseAutoencoder] | None = None,
    member: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    format: str | None = None,
) -> SparseAutoencoder:
    """Read an SAE of this package or of another library, ready for raw activations.

    Args:
        path: A folder that `save_pretrained` wrote, a `.ckpt` file of a training run, a folder or
            file in another library's format, see `lightning_sae.interop`, or the name
            `owner/name[/folder]` of any of these on the Hugging Face hub.
        architecture: Class to build; by default the class that the file names.
        member: Name of the SAE, in a checkpoint of several side by side.
        device: Its device; the CPU by default.
        dtype: dtype of its weights; by default the stored one.
        revision: Branch, tag or commit of a repository on the hub.
        format: Format of another library's files, if it cannot be recognised: a name in
            `lightning_sae.interop.FORMATS`.

    Returns:
        The SAE in evaluation mode; `sae.source` names its model and hook, and
        `sae.source["imported"]` the units of an imported SAE's latents.

    Raises:
        ValueError: If there is no SAE at `path`, it is damaged or not finite, it needs another
            class, or it is one SAE and a `member` is given; or if the device does not exist.
    """
    require_place(device, dtype)
    _require_class(architecture)
    path = on_disk(path, revision)
    if path.suffix == ".safetensors" and path.is_file():  # its description is beside it
        path = path.parent
    if format is None and _is_checkpoint(path):
        return _load_checkpoint(path, architecture, member).to(device=device, dtype=dtype)
    _require_no_member(member, path)
    if format is None and interop.is_ours(path):
        sae = read(path, *_classes(architecture))
    else:
        named = None if architecture is None else architecture.__name__
        description, weights = interop.read(path, format, named)
        sae = build(description, weights, path, *_classes(architecture))
    return sae.to(device=device, dtype=dtype)


def _is_checkpoint(path: Path) -> bool:
    return path.suffix == ".ckpt" or (path.is_file() and interop.recognised(path) is None)


def require_place(device: str | torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise a ValueError if weights cannot have this device or dtype."""
    expect(dtype is None or dtype in FLOATS, "dtype", f"one of {FLOATS}", repr(dtype))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # of a torch without this device
        why = f"{device} ({first_line(error)}): leave it out for the CPU"
        expect(False, "device", "one that this machine has", why)


def _require_class(architecture: Any) -> None:
    is_one = isinstance(architecture, type) and issubclass(architecture, SparseAutoencoder)
    expected = "a class of SAEs, such as `TopKSAE`, or None"
    expect(architecture is None or is_one, "architecture", expected, repr(architecture))


def _require_no_member(member: str | None, path: Path) -> None:
    expect(member is None, "member", f"None, for {path} is of one SAE", repr(member))


def _classes(architecture: type[SparseAutoencoder] | None) -> list[type[SparseAutoencoder]]:
    if architecture is not None:
        return [architecture]
    every = [getattr(architectures, name) for name in architectures.__all__]
    return [kind for kind in every if kind is not SparseAutoencoder]


def _load_checkpoint(
    path: Path, architecture: type[SparseAutoencoder] | None, member: str | None
) -> SparseAutoencoder:
    if not path.is_file():
        raise ValueError(f"Expected argument `path` to be an SAE but {path} does not exist.")
    checkpoint = read_checkpoint(path, needed=NEEDED)
    expect("state_dict" in checkpoint, "path", "an SAE with weights", f"{path}, which has none")
    if "members" in checkpoint:
        checkpoint = _of_member(checkpoint, member, path)
    else:
        _require_no_member(member, path)
    if "lightning_sae" not in checkpoint:
        raise ValueError(
            f"Expected argument `path` to hold an SAE but {path} holds something else."
        )
    its = checkpoint["lightning_sae"]
    description = {
        "architecture": its.get("architecture"),
        "source": its.get("source"),
        "arguments": arguments_of(checkpoint.get("hyper_parameters", {})),
    }
    require_entries(description, path)
    return build(description, checkpoint["state_dict"], path, *_classes(architecture))


def _of_member(checkpoint: dict[str, Any], member: str | None, path: Path) -> dict[str, Any]:
    """The SAE's entries as in a checkpoint of the member alone."""
    names = [str(own.get("name")) for own in checkpoint["members"]]
    if member not in names:
        raise ValueError(
            f"Expected argument `member` to be one of {', '.join(names)}, for the checkpoint is of "
            f"several SAEs, but got {member}."
        )
    place = names.index(member)
    prefix, weights = f"saes.{place}.", checkpoint["state_dict"]
    of_members = tuple(f"saes.{i}." for i in range(len(names)))
    others = sorted(str(name) for name in weights if not str(name).startswith(of_members))
    if others:
        raise ValueError(
            f"Could not read {path}: beside the weights of {', '.join(names)} it has "
            f"{', '.join(others)}, which are of none of them."
        )
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return {**checkpoint["members"][place], "state_dict": own}
