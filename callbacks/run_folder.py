"""The folder of a run: locked for one process, and never overwritten."""

import os
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
CURVES = "events.out.tfevents.*"  # of TensorBoard
PARTS = ("checkpoints", "sae", "members", "results.json", "latents")


class _Hold(NamedTuple):
    descriptor: int
    times: int  # requests for it
    made: bool  # whether the folder was created for it


_held: dict[Path, _Hold] = {}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from training into `folder`; see `hold`."""
    hold(folder)
    try:
        yield
    finally:
        release(folder)


def hold(folder: Path) -> None:
    """Lock a folder for this process. Each `hold` needs a `release`.

    The lock ends with the process, however it ends, and is not inherited by its children.

    Raises:
        ValueError: If another process trains there.
    """
    if fcntl is None:
        return
    folder = folder.resolve()
    if folder in _held:
        _held[folder] = _held[folder]._replace(times=_held[folder].times + 1)
        return
    made = not folder.exists()
    descriptor = _locked(folder / LOCK)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[folder] = _Hold(descriptor, 1, made)


def release(folder: Path) -> None:
    """Unlock a folder that `hold` locked; does nothing for other folders."""
    folder = folder.resolve()
    if folder not in _held:
        return
    own = _held.pop(folder)
    if own.times > 1:
        _held[folder] = own._replace(times=own.times - 1)
        return
    (folder / LOCK).unlink(missing_ok=True)
    os.close(own.descriptor)
    if own.made and folder.is_dir() and not any(folder.iterdir()):  # nothing was written
        folder.rmdir()


@contextmanager
def without_empty_curves(folder: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Remove the event files of a run that is refused: Lightning opens them before its checks.

    Args:
        folder: The run's folder.
        has_begun: Whether the run got past the checks, so that its curves stay.
    """
    before = {*folder.rglob(CURVES)}
    try:
        yield
    except Exception:
        if not has_begun():
            for path in {*folder.rglob(CURVES)} - before:
                path.unlink()
                _remove_empty(path.parent, folder)
        raise


def _remove_empty(part: Path, folder: Path) -> None:
    while part != folder and not any(part.iterdir()):
        part.rmdir()
        part = part.parent


def _locked(path: Path) -> int:
    """An open file that only this process has locked and that still exists."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            other = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"Expected argument `trainer.default_root_dir` to be an unused folder but "
                f"another run is in progress in {path.parent} ({other or 'just begun'}): choose "
                "another folder, or wait for its end."
            ) from error
        except OSError:  # a file system without locks
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def require_new_run(folder: Path, ckpt_path: str | Path | None) -> None:
    """Raise a ValueError if `folder` holds results of a run that is not being resumed.

    The files of a run that was stopped before its first checkpoint do not count: its configuration,
    curves, and unfinished writes.
    """
    held_parts = [name for name in PARTS if _holds_something(folder / name)]
    inside = ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents
    if held_parts and not inside:
        raise ValueError(
            f"Expected argument `trainer.default_root_dir` to be a new folder but {folder} holds a "
            f"run ({', '.join(held_parts)}), which is not overwritten: choose another folder"
            + _way_on(folder)
        )


def _way_on(folder: Path) -> str:
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return "."
    return f", or continue that run with --ckpt_path {shlex.quote(str(last))}"


def _holds_something(path: Path) -> bool:
    """Whether there is a file, or a folder with a file that is not hidden, at any depth."""
    if not path.is_dir():
        return path.exists()
    return any(_holds_something(each) for each in path.iterdir() if each.name[0] != ".")
