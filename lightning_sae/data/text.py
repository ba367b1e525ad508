"""Text from files, folders, the hub or the standard library, as documents in a known order."""

import glob
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from lightning_sae.data.documents import Document
from lightning_sae.data.embedded import standard_library_documents

SEPARATOR = "<|endoftext|>"
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@runtime_checkable
class Corpus(Protocol):
    """Documents that can be read again and again, in an order that a seed fixes."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        """The documents of the given pass over the text, from position `start` on."""


class IndexedCorpus:
    """Documents with random access, in a new order every epoch.

    Args:
        documents: The documents; read one at a time.
        seed: Fixes the order of every epoch.
    """

    def __init__(self, documents: Sequence[Document], seed: int = 0) -> None:
        self.documents = documents
        self.seed = seed

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        """The documents of the given pass over the text, from position `start` on."""
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(len(self.documents), generator=generator)[start:]
        return (self.documents[i] for i in order.tolist())


class StreamedCorpus:
    """Rows of a streaming `datasets.IterableDataset`, in its own order every epoch."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows
        self.column = column

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        """The documents of any pass over the text, from position `start` on."""
        rows = self.rows.skip(start)
        rows.set_epoch(number)  # a shuffled stream has an order for each
        return (named(row[self.column] or "") for row in rows)


class TextFile(Sequence[Document]):
    """A text file whose documents stand between `<|endoftext|>` marks; only offsets are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans = list(_spans(path, SEPARATOR.encode()))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:  # slices are not needed
        start, end = self.spans[index]
        with self.path.open("rb") as file:
            file.seek(start)
            return named(file.read(end - start).decode(errors="replace").strip())


class Rows(Sequence[Document]):
    """The text column of a `datasets.Dataset`."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return named(self.rows[index][self.column] or "")  # a row may have no text


class Joined(Sequence[Document]):
    """Several sequences of documents, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Document]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def named(text: str) -> Document:
    """A document named after its content, so that copies of it always share a split."""
    return Document(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), text)


def open_text(
    text: str | Path | Sequence[str | Path],
    column: str = "text",
    split: str = "train",
    streaming: bool = False,
    seed: int = 0,
) -> Corpus:
    """Open text of any kind.

    Args:
        text: `embedded` for the standard library's source; files (.txt, .jsonl, .parquet), glob
            patterns or folders of them; a folder that `datasets` saved; or a hub name.
        column: Name of the text column, where there are columns.
        split: Split of a hub or saved data set.
        streaming: Read a hub data set as a stream, without a copy on the disk.
        seed: Fixes the order of the documents.

    Raises:
        ValueError: If a file is missing, of an unknown kind, or the hub is out of reach.
    """
    if text == "embedded":
        return IndexedCorpus(standard_library_documents(), seed)
    sources = [text] if isinstance(text, str | Path) else list(text)
    parts = [_open_local(os.path.expanduser(s), column, split) for s in sources]
    if all(part is not None for part in parts):
        return IndexedCorpus(Joined([p for p in parts if p is not None]), seed)
    if len(sources) > 1:
        missing = [str(s) for s, part in zip(sources, parts, strict=True) if part is None]
        raise ValueError(f"Expected argument `text` to list files but there is no {missing}.")
    return _open_hub(str(sources[0]), column, split, streaming, seed)


def _open_local(source: str, column: str, split: str) -> Sequence[Document] | None:
    """Documents of a file, folder or glob pattern; None if there is nothing of that name."""
    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return Rows(_column_checked(_saved(path, split), column, source), column)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in {".txt", *READERS})
    else:
        files = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(source))]
    if not files and (source.startswith(("/", ".")) or path.suffix in {".txt", *READERS}):
        raise ValueError(
            f"Expected argument `text` to name files but there is none at {source}: check the path "
            f"(.txt, .jsonl and .parquet files are read)."
        )
    return Joined([_open_file(file, column) for file in files]) if files else None


def _open_file(path: Path, column: str) -> Sequence[Document]:
    if path.suffix == ".txt":
        return TextFile(path)
    if path.suffix not in READERS:
        raise ValueError(
            f"Expected argument `text` to name .txt, .jsonl or .parquet files but got {path}: "
            "convert it, or rename it if it is plain text."
        )
    from datasets import load_dataset

    rows = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    return Rows(_column_checked(rows, column, str(path)), column)


def _saved(path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(
            f"Expected argument `text_split` to be one of {[*saved]} but got `{split}` for {path}."
        )
    return saved[split]


def _open_hub(name: str, column: str, split: str, streaming: bool, seed: int) -> Corpus:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Could not open `text`={name}: there is no such file or folder, and the hub did not "
            f"give it. Check the name and the network. The hub's answer: {error}"
        ) from error
    _column_checked(rows, column, name)
    return StreamedCorpus(rows, column) if streaming else IndexedCorpus(Rows(rows, column), seed)


def _column_checked(rows: Any, column: str, source: str) -> Any:
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(
            f"Expected argument `text_column` to be one of {rows.column_names} but got `{column}` "
            f"for {source}."
        )
    kind = getattr((rows.features or {}).get(column), "dtype", "string")
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"Expected argument `text_column` to name a column of text but `{column}` of {source} "
            f"holds {kind}: name another column."
        )
    return rows


def _spans(path: Path, separator: bytes) -> Iterator[tuple[int, int]]:
    """Byte ranges of the documents that are more than white space."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        while start < len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end
            if data[start:end].strip():
                yield start, end
            start = end + len(separator)
