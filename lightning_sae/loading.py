"""`load`: from a folder or a checkpoint to an SAE. The one place that knows all architectures."""

from pathlib import Path
from typing import Any, overload

from lightning_sae import architectures
from lightning_sae.architectures.base import SAE, SparseAutoencoder
from lightning_sae.architectures.portable import arguments_of, build, read
from lightning_sae.files import read_checkpoint

NEEDED = ("state_dict", "hyper_parameters", "lightning_sae", "members")
"""What an SAE needs of a checkpoint."""


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
    return read(path, *_classes(architecture))


def _classes(architecture: type[SparseAutoencoder] | None) -> list[type[SparseAutoencoder]]:
    if architecture is not None:
        return [architecture]
    return [getattr(architectures, name) for name in architectures.__all__]


def _load_checkpoint(
    path: Path, architecture: type[SparseAutoencoder] | None, member: str | None
) -> SparseAutoencoder:
    if not path.is_file():
        raise ValueError(f"Expected argument `path` to be an SAE but {path} does not exist.")
    checkpoint = read_checkpoint(path, needed=NEEDED)
    if "members" in checkpoint:
        checkpoint = _of_member(checkpoint, member)
    if "lightning_sae" not in checkpoint:
        raise ValueError(
            f"Expected argument `path` to hold an SAE but {path} holds something else."
        )
    arguments = arguments_of(checkpoint["hyper_parameters"])
    description = {**checkpoint["lightning_sae"], "arguments": arguments}
    return build(description, checkpoint["state_dict"], *_classes(architecture))


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
