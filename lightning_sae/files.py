"""Atomic file writes, and checks that a checkpoint is undamaged."""

import glob
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import override


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary file beside `path`, then replace `path` by it.

    `path` is always either unchanged or completely written.

    Raises:
        OSError: If writing fails, for instance on a full disk; the message says whether the old
            file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # the permissions of an ordinary new file
        _flush_to_disk(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap ENOSPC
        kept = f"the earlier {path.name} is intact" if path.exists() else "nothing was written"
        raise OSError(f"Could not write {path}: {error}; {kept}. Free some disk space.") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove files of killed writes of `folder/name`, a glob pattern; see `write_atomically`."""
    for path in folder.glob(f".{name}.*"):
        if path.is_file():
            path.unlink(missing_ok=True)


UNFINISHED = ".unfinished-"
"""In names of folders that are being written, or were when their process was killed."""


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files appear in `folder` when the block has written all of them.

    If the block fails or is killed, `folder` is as it was; the next call removes what a killed one
    left.

    Args:
        folder: New or empty. A new one appears at once with all its files.
    """
    is_new = not folder.exists()
    parent, prefix = (
        (folder.parent, f".{folder.name}{UNFINISHED}") if is_new else (folder, UNFINISHED)
    )
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(left_over)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # the permissions of an ordinary new folder
        if is_new:
            temporary.rename(folder)
            return
        for path in temporary.iterdir():
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If it is not JSON; the message is one line and names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Could not read {path}: it is no JSON ({first_line(error)}).") from error


def write_json(path: Path, content: Any) -> None:
    """Write plain values to a JSON file, replacing an earlier one."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with the entry `checksum`, a SHA-256 of all others, for `require_checksum`."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return {**rest, "checksum": sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def require_checksum(path: Path, content: Mapping[str, Any]) -> None:
    """Raise a ValueError if the content of a JSON file does not match its entry `checksum`.

    Files without this entry, of earlier versions, are not checked.
    """
    if "checksum" in content and with_checksum(content)["checksum"] != content["checksum"]:
        raise ValueError(
            f"Could not read {path}: it is not what was written (its checksum). Restore the file; "
            "or if you changed it yourself, delete `checksum`, and nothing is compared any more."
        )


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it has the value NaN")
    return float(name)


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


PIECE = 2**24
"""Entries of a weight that are looked at together."""


def not_finite(weights: Mapping[str, Tensor], buffers: Collection[str] | None = None) -> list[str]:
    """Names of the weights that are not finite.

    Args:
        weights: Tensors by name.
        buffers: Names of tensors that may be -inf, such as a threshold below all values; by default
            all that are not matrices.
    """
    return sorted(name for name, weight in weights.items() if _is_bad(name, weight, buffers))


def _is_bad(name: str, weight: Tensor, buffers: Collection[str] | None) -> bool:
    if not weight.is_floating_point():
        return False
    may_be_low = weight.dim() < 2 if buffers is None else name in buffers
    ordered = weight if weight.is_contiguous() or weight.dim() < 2 else weight.mT
    # Piece by piece, because comparing all of a large dictionary takes as much memory again.
    return any(
        not torch.isfinite(piece).all()
        and not (may_be_low and (torch.isfinite(piece) | (piece == -torch.inf)).all())
        for piece in ordered.reshape(-1).split(PIECE)
    )


# Damage. `torch.load` checks nothing, but the zip archive has a checksum for each record. One
# record holds the structure, each other one a tensor.


def _damaged_entries(path: str | Path, file: BinaryIO) -> set[str]:
    """Names of the entries with damaged tensors.

    Raises:
        ValueError: If the archive or its structure is damaged.
    """
    try:
        records = damaged_records(file)
        if not all("/data/" in record.filename for record in records):
            raise ValueError("what describes its tensors does not match its checksum")
        return _entries_in(file, records) if records else set()
    except Exception as error:  # a damaged archive raises errors of many types
        raise _refusal(path, f"it is damaged ({first_line(error)})") from error


def damaged_records(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Records of an archive of `torch.save` that do not match their checksums.

    Raises:
        ValueError: If it is not such an archive.
        BadZipFile: If a record is of a kind that `torch.save` does not write.
    """
    if not file.read(1):
        raise ValueError("the file is empty")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not an archive of `torch.save`, or its end is missing")
    with zipfile.ZipFile(file) as archive:
        return [record for record in archive.infolist() if not _is_intact(archive, record)]


FOLDER = 0x10
"""The attribute that marks a zip record as a folder."""


def _is_intact(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Whether a record matches its checksum, which Python compares after reading it.

    Raises:
        BadZipFile: If it is not at its place, or of a kind that `torch.save` does not write. From a
            folder, `torch.load` would read nothing and return uninitialised memory.
    """
    stored = record.compress_type == zipfile.ZIP_STORED and not record.external_attr & FOLDER
    if not stored or record.file_size != record.compress_size:
        raise zipfile.BadZipFile("its table of contents is wrong")
    with archive.open(record) as content:
        try:
            while content.read(2**20):
                pass
        except zipfile.BadZipFile:
            return False
    return True


def _entries_in(file: BinaryIO, records: list[zipfile.ZipInfo]) -> set[str]:
    """Names of the entries of a checkpoint whose tensors are in some of its records."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        starts = sorted(record.header_offset for record in archive.infolist())
    file.seek(0)
    with FakeTensorMode():  # tensors without values, which know their offset in the file
        content = torch.load(file, "cpu", weights_only=True)
    damaged = {record.header_offset for record in records}

    def within(tensor: Tensor) -> bool:
        place = tensor.untyped_storage()._checkpoint_offset
        assert place is not None
        return max(start for start in starts if start < place) in damaged

    return {name for name, value in content.items() if any(map(within, _tensors(value)))}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
