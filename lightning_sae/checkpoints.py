"""Checkpoints: written atomically, and checked for damage when they are read."""

import os
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor
from typing_extensions import override

from lightning_sae.archives import damaged_records, entries_in
from lightning_sae.files import first_line, write_atomically
from lightning_sae.tensors import not_finite


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that writes atomically: first beside the old file, then in its place.

    Attributes:
        mapped: Whether weights and moments are read from the file when they are used, see
            `read_checkpoint`; for processes that use a part of them.
    """

    mapped = False

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint`; a failure leaves an existing file at `path` as it was."""
        if "://" in str(path):  # remote storage, where files cannot be renamed
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, after a check for damage.

        By default only tensors and plain values, because a pickle can run code, and onto the CPU,
        because the device that saved it may not be here, or belong to another process.

        Raises:
            ValueError: If it is damaged, or not a checkpoint of Lightning.
        """
        content = read_checkpoint(
            path, map_location, weights_only=weights_only is not False, mapped=self.mapped
        )
        missing = [name for name in OF_LIGHTNING if name not in content]
        if missing:
            raise _refusal(path, f"it lacks {_listed(missing)}, which Lightning writes")
        return content


ENTRIES = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "lightning_sae": dict,
    "members": list,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
"""Types of a checkpoint's entries, each of which may be missing."""
ENTRIES |= {"settings": dict, "hparams_name": str}
OF_LIGHTNING = ("state_dict", "epoch", "global_step", "pytorch-lightning_version")
"""Entries without which Lightning restores nothing."""
LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


def read_checkpoint(
    path: str | Path,
    map_location: Any | None = "cpu",
    needed: tuple[str, ...] | None = None,
    weights_only: bool = True,
    mapped: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint, and check that it is undamaged.

    Args:
        path: The file.
        map_location: Device of the tensors, as for `torch.load`.
        needed: Entries that are needed; damage in others only gives a warning and drops them. By
            default all.
        weights_only: Whether to read only tensors and plain values. Reading other objects can run
            code.
        mapped: Whether weights and moments stay in the file, of which the system reads what is
            used; it may not be changed in place as long as they are. Elsewhere than on a local
            disk they are read.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        ValueError: If it is not a checkpoint, is damaged, or its weights are not finite. The
            message is one line, and names the file, its intact parts and what to use instead.
    """
    filesystem = get_filesystem(path)
    if filesystem.isdir(str(path)):
        raise ValueError(f"Could not read {path} as a checkpoint: it is a folder.")
    with filesystem.open(str(path), "rb") as file:
        damaged = _damaged_entries(path, file)
        lost = damaged if needed is None else damaged & {*needed}
        if lost:
            raise _refusal(path, _what_is_left(path, damaged))
        file.seek(0)
        if mapped and "://" not in str(path):
            content = _mapped(path, file, map_location, weights_only)
        else:
            content = _content(path, file, map_location, weights_only)
    if damaged:
        warnings.warn(
            f"{path} is damaged in {_listed(damaged)}, which are not needed here; the rest of it "
            "is intact.",
            stacklevel=2,
        )
    _require_entries(path, content)
    return {name: value for name, value in content.items() if name not in damaged}


IN_FILE = {"state_dict", "optimizer_states"}
"""Entries of a checkpoint that are read when they are used, if it is mapped."""


def _mapped(path: str | Path, file: BinaryIO, map_location: Any, weights_only: bool) -> Any:
    """The content of a file that was checked, of which `IN_FILE` is not read yet."""
    content = _content(path, path, map_location, weights_only, mmap=True)
    checked, present = os.fstat(file.fileno()), os.stat(path)
    if (checked.st_ino, checked.st_mtime_ns) != (present.st_ino, present.st_mtime_ns):
        raise ValueError(f"Could not read {path}: it was replaced meanwhile. Start again.")
    if not isinstance(content, dict):
        return content
    return {name: v if name in IN_FILE else _in_memory(v) for name, v in content.items()}


def _in_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _in_memory(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_in_memory, value))
    return value


def _content(
    path: str | Path, file: Any, map_location: Any, weights_only: bool, mmap: bool = False
) -> Any:
    try:
        return torch.load(file, map_location, weights_only=weights_only, mmap=mmap)
    except UnpicklingError as error:
        kinds = re.findall(r"(?:GLOBAL|class|type) ([\w.]+\.\w+)", str(error))
        kind = f"a {kinds[0]}" if kinds else "an object"
        reason = f"it holds {kind}, and only tensors and plain values are read, for others can run"
        raise _refusal(path, f"{reason} code") from error
    except Exception as error:  # `torch.load` raises errors of many types on damaged files
        raise _refusal(path, f"it is damaged ({first_line(error)})") from error


def _require_entries(path: str | Path, content: Any) -> None:
    if not isinstance(content, dict):
        raise _refusal(path, f"it holds a {type(content).__name__} and no checkpoint")
    for name, kind in ENTRIES.items():
        if name in content and not isinstance(content[name], kind):
            raise _refusal(path, f"its `{name}` is a {type(content[name]).__name__}")
    _require_parts(path, content)
    weights = content.get("state_dict", {})
    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise _refusal(path, "its `state_dict` holds more than tensors")
    if "members" not in content:  # the state of stopped members may not be finite
        bad = not_finite(weights)
        if bad:
            raise _refusal(path, f"its weights are not finite ({_listed(bad)})")


def _require_parts(path: str | Path, content: dict[str, Any]) -> None:
    """Raise a ValueError if a part of an entry is missing or of a wrong type."""
    loops = content.get("loops", {})
    parts: dict[str, tuple[Any, type]] = {
        **{f"loops.{name}": (loops.get(name), dict) for name in LOOPS if "loops" in content},
        **{f"callbacks.{k}": (v, dict) for k, v in content.get("callbacks", {}).items()},
        **{f"members.{i}": (v, dict) for i, v in enumerate(content.get("members", []))},
        **{f"optimizer_states.{i}": (v, dict) for i, v in enumerate(_states(content))},
    }
    own = content.get("lightning_sae")
    if own is not None:
        parts |= {
            "architecture": (own.get("architecture"), str),
            "source": (own.get("source"), dict),
        }
    for name, (value, kind) in parts.items():
        if not isinstance(value, kind):
            raise _refusal(path, f"its `{name}` is {value!r:.40}, and not a {kind.__name__}")
    counts = {name: content.get(name, 0) for name in ("epoch", "global_step")}
    for name, count in counts.items():
        if count < 0:
            raise _refusal(path, f"its `{name}` is {count}")


def _states(content: dict[str, Any]) -> list[Any]:
    states: list[Any] = content.get("optimizer_states", [])
    return states


def _damaged_entries(path: str | Path, file: BinaryIO) -> set[str]:
    """Names of the entries with damaged tensors.

    Raises:
        ValueError: If the archive or its structure is damaged.
    """
    try:
        records = damaged_records(file)
        if not all("/data/" in record.filename for record in records):
            raise ValueError("what describes its tensors does not match its checksum")
        return entries_in(file, records) if records else set()
    except Exception as error:  # a damaged archive raises errors of many types
        raise _refusal(path, f"it is damaged ({first_line(error)})") from error


def _what_is_left(path: str | Path, damaged: set[str]) -> str:
    reason = f"it is damaged in {_listed(damaged)}, which do not match their checksums"
    if "state_dict" in damaged:
        return reason
    return f"{reason}; its weights are intact: `lightning_sae.load({str(path)!r})` reads them"


def _refusal(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"Could not read {path} as a checkpoint: {reason}. {_instead_of(Path(path))}")


def _instead_of(path: Path) -> str:
    """What to use instead of a damaged checkpoint: other checkpoints, or exported SAEs."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path and _is_sound(other)]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    exported = [*run.glob("sae*/config.json"), *run.glob("members/*/sae*/config.json")]
    if others:
        return f"Beside it, {others[0]} is intact: continue from it with --ckpt_path."
    if exported:
        folders = _listed(str(config.parent) for config in exported)
        return f"The exported SAE is there for `lightning_sae.load`: {folders}."
    return "There is no other checkpoint beside it and no exported SAE: start over."


def _is_sound(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not damaged_records(file)
    except Exception:
        return False


def _listed(names: Any) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
