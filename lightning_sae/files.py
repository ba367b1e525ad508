"""Atomic file writes, and JSON files with a checksum."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
