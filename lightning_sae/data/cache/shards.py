"""Shards: safetensors files with a tensor for each hook, and the token and position of each row."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_sae.data.cache.manifest import Manifest, Shard, Split, require_size
from lightning_sae.data.cache.rows import Rows
from lightning_sae.files import first_line, write_atomically

TOKENS, POSITIONS = "tokens", "positions"
"""Further tensors of a shard: each row's token id and its position in the block."""

SPARE_SHARE, SPARE_BYTES = 0.05, 5 * 2**30
"""Disk space to leave free: this share of the disk, but at most this many bytes."""


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> Shard:
    """Write a shard atomically, and hash the file on disk.

    Raises:
        OSError: If the disk has no room for it.
    """
    require_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    found = ""

    def write(temporary: Path) -> None:
        nonlocal found
        save_file(dict(tensors), temporary)
        found = hash_of(temporary)

    write_atomically(path, write)
    return Shard(path.name, len(tensors[TOKENS]), path.stat().st_size, found)


def free_bytes(folder: Path) -> int:
    """Bytes that may be written to the disk of a folder, leaving some space free."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    return usage.free - int(min(SPARE_SHARE * usage.total, SPARE_BYTES))


def require_space(folder: Path, nbytes: int) -> None:
    """Raise an OSError if `nbytes` bytes would fill the disk."""
    free = free_bytes(folder)
    if nbytes > free:
        raise OSError(
            f"The disk of {folder} is nearly full: the next {nbytes / 2**20:,.0f} MiB do not fit "
            f"into the {max(free, 0) / 2**20:,.0f} MiB that may be used. All shards so far are "
            "kept: free some disk space and give the same command again, or one with fewer "
            "`--tokens`."
        )


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def require_hashes(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise a ValueError if a shard was altered; eight are read at a time."""

    def check(shard: Shard) -> None:
        require_size(folder, shard)
        found = hash_of(folder / shard.file)
        if found != shard.sha256:
            raise ValueError(
                f"The shard {folder / shard.file} is altered: its SHA-256 is {found} but it was "
                f"written as {shard.sha256}. Restore the file, or write the cache again into "
                "another folder."
            )

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(check, shards):
            pass


def open_rows(folder: Path, manifest: Manifest, split: Split) -> Rows:
    """The rows of a split, mapped from its files.

    Raises:
        ValueError: If a shard does not hold what the manifest says.
    """
    shards = manifest.shards.get(split, ())
    return Rows([_opened(folder, shard, manifest) for shard in shards if shard.rows])


def _opened(folder: Path, shard: Shard, manifest: Manifest) -> dict[str, Tensor]:
    path = folder / shard.file
    found = mapped(path, lambda name: name in manifest.widths)
    for name, width in manifest.widths.items():
        part, shape, dtype = found.get(name), (shard.rows, width), manifest.dtype
        if part is None or tuple(part.shape) != shape or str(part.dtype) != f"torch.{dtype}":
            kind = "nothing" if part is None else f"{part.dtype} of shape {tuple(part.shape)}"
            raise ValueError(
                f"Expected the shard {path} of SHA-256 {shard.sha256} to hold {dtype} of shape "
                f"{shape} at {name} but it holds {kind}: it is of another cache. Restore the file."
            )
    return {name: found[name] for name in manifest.widths}


def mapped(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Memory-mapped tensors of a safetensors file.

    Raises:
        ValueError: If it is not a complete safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Could not read {path}: it is not a complete safetensors file ({first_line(error)}). "
            "Restore it or write it again."
        ) from error
