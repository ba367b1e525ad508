"""Compressed files, unpacked once into the cache of `datasets`."""

import bz2
import gzip
import hashlib
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_sae.files import write_atomically

CHUNK = 2**20


def decompressed(path: Path, suffix: str) -> Path:
    """The file itself if it is not compressed, otherwise an unpacked copy with this suffix.

    A file that changes is unpacked again.

    Raises:
        ValueError: If it is damaged, or needs a package that is not installed.
    """
    chunks = COMPRESSIONS.get(path.suffix.lower())
    if chunks is None:
        return path
    from datasets import config

    now = path.stat()
    key = f"{path.resolve()} {now.st_mtime_ns} {now.st_size}"
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest() + suffix
    copy = Path(config.HF_DATASETS_CACHE) / "lightning_sae" / name
    if not copy.exists():
        write_atomically(copy, lambda temporary: _unpack(path, chunks, temporary))
    return copy


def _unpack(path: Path, chunks: Callable[[Path], Iterator[bytes]], output: Path) -> None:
    unpacked = chunks(path)
    with output.open("wb") as file:
        while True:
            try:
                chunk = next(unpacked, None)
            except ImportError as error:
                raise ValueError(
                    f"Could not read {path}: install `zstandard` for it, or unpack it."
                ) from error
            except Exception as error:  # of any compression
                raise ValueError(
                    f"Could not read {path}: {error}. It is cut off or damaged: download it "
                    "again, or leave it out."
                ) from error
            if chunk is None:
                return
            file.write(chunk)


def _by(opened: Callable[[Path], Any]) -> Callable[[Path], Iterator[bytes]]:
    def chunks(path: Path) -> Iterator[bytes]:
        with opened(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk

    return chunks


def _zstd(path: Path) -> Iterator[bytes]:
    import zstandard

    frame = None
    with path.open("rb") as file:
        while compressed := file.read(CHUNK):
            while compressed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(compressed)
                compressed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


COMPRESSIONS: dict[str, Callable[[Path], Iterator[bytes]]] = {
    ".gz": _by(gzip.open),
    ".zst": _zstd,
    ".bz2": _by(bz2.open),
    ".xz": _by(lzma.open),
}
"""The unpacked content of a file, by the suffix of its compression."""
