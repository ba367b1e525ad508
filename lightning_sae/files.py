"""Files that are complete or not there: writes beside the old file, then a rename."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from typing_extensions import override


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
