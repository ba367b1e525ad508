"""Open text from files, folders, the hub, the standard library or Python as ordered documents."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.data.documents import Document, Documents, named
from lightning_sae.data.embedded import standard_library_documents
from lightning_sae.data.local_files import SUFFIXES, Rows, kind, open_file, require_column

Text = Iterable[Any] | str | Path  # in this order: parses a YAML list as a list, not as a string
"""`embedded`, a file, folder, glob pattern or hub name, a list of these, or rows: an iterable."""

ROWS = '[{"text": "..."}]'


@runtime_checkable
class Corpus(Protocol):
    """Documents that can be read repeatedly, in an order fixed by a seed."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        """The documents of the given pass over the text, from position `start` on."""


class IndexedCorpus:
    """Documents with random access, in a new order every epoch.

    Args:
        documents: The documents; read one at a time.
        seed: Fixes the order of every epoch.
    """

    def __init__(self, documents: Documents, seed: int = 0) -> None:
        self.documents = documents
        self.seed = seed

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        """The documents of the given pass over the text, from position `start` on."""
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(len(self.documents), generator=generator)[start:]
        return (self.documents[i] for i in order.tolist())


class StreamedCorpus:
    """Rows that can only be iterated, in their own order every epoch.

    Args:
        rows: A streaming `datasets.IterableDataset`, or any object that can be iterated again.
        column: Column of the text, where rows are dictionaries.
        source: Name of the rows, for messages.
    """

    def __init__(self, rows: Any, column: str, source: str = "the stream") -> None:
        self.rows, self.column, self.source = rows, column, source

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        """The documents of any pass over the text, from position `start` on."""
        from datasets import IterableDataset

        if isinstance(self.rows, IterableDataset):
            rows = self.rows.skip(start)
            rows.set_epoch(number)  # a shuffled stream has another order in each epoch
        else:
            rows = islice(self.rows, start, None)
        for number_of_row, row in enumerate(rows, start + 1):
            yield named(_cell(row, self.column), f"row {number_of_row} of {self.source}")


class Items:
    """Rows from Python with random access."""

    def __init__(self, rows: Any, column: str, source: str) -> None:
        self.rows, self.column, self.source = rows, column, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        where = f"row {index + 1} of {self.source}"
        return named(_cell(self.rows[index], self.column), where)


def _cell(row: Any, column: str) -> Any:
    return row.get(column) if isinstance(row, Mapping) else row


def open_text(
    text: Text,
    column: str = "text",
    split: str = "train",
    streaming: bool = False,
    seed: int = 0,
) -> Corpus:
    """Open text of any kind.

    Args:
        text: `embedded` for the standard library's source; files (.txt, .jsonl, .json, .csv, .tsv,
            .parquet, plain or compressed), glob patterns or folders of them; a folder that
            `datasets` saved; a hub name; or rows from Python: a data set, or any iterable of
            strings, lists of token ids, chats, or dictionaries with these in a column.
        column: Name of the column to read, if the text has columns.
        split: Split of a hub or saved data set.
        streaming: Read a hub data set as a stream, without a copy on the disk.
        seed: Fixes the order of the documents.

    Raises:
        ValueError: If a file is missing, damaged or of an unknown kind, or the hub cannot be
            reached.
    """
    if isinstance(text, str) and text == "embedded":
        return IndexedCorpus(standard_library_documents(), seed)
    if not _names_files(text):
        return _open_rows(text, column, split, seed)
    sources = [text] if isinstance(text, str | Path) else list(text)
    _require_names(sources)
    parts = [_open_local(os.path.expanduser(s), column, split) for s in sources]
    found = [part for part in parts if part is not None]
    if len(found) == len(parts):
        return IndexedCorpus(_joined(found, ", ".join(map(str, sources))), seed)
    if len(sources) > 1:
        missing = [str(s) for s, part in zip(sources, parts, strict=True) if part is None]
        raise ValueError(
            f"Expected argument `text` to list files but there is no {missing}: check the paths. "
            f"Texts themselves are given as rows, {ROWS}."
        )
    return _open_hub(str(sources[0]), column, split, streaming, seed)


def described(text: Text) -> str | list[str]:
    """Plain values that describe where the text comes from."""
    if isinstance(text, str | Path):
        return str(text)
    return [*map(str, text)] if _names_files(text) else _kind_of_rows(text)


def _names_files(text: Text) -> bool:
    several = isinstance(text, list | tuple) and len(text) > 0
    return isinstance(text, str | Path) or (
        several and all(isinstance(item, str | Path) for item in text)
    )


def _require_names(sources: Sequence[str | Path]) -> None:
    for source in map(str, sources):
        if len(source) > 1000 or "\n" in source or "\0" in source:
            raise ValueError(
                f"Expected argument `text` to name files but got {source[:40]!r}...: texts "
                f"themselves are given as rows, {ROWS}."
            )


def _kind_of_rows(rows: Any) -> str:
    return f"a Python {type(rows).__name__}"


def _open_rows(rows: Any, column: str, split: str, seed: int, name: str | None = None) -> Corpus:
    from datasets import Dataset, IterableDataset

    source = name or _kind_of_rows(rows)
    if isinstance(rows, Dataset):
        return IndexedCorpus(_not_empty(Rows(rows, column, source), source), seed)
    if isinstance(rows, Mapping):
        return _open_rows(_split(rows, split, source), column, split, seed)
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return IndexedCorpus(_not_empty(Items(rows, column, source), source), seed)
    if isinstance(rows, IterableDataset):
        require_column(rows, column, source)
    elif not isinstance(rows, Iterable) or iter(rows) is iter(rows):
        raise ValueError(
            f"Expected argument `text` to be iterable more than once but got {source}: give a "
            "list, or an object whose `__iter__` starts over."
        )
    return _streamed(rows, column, source)


def _open_local(source: str, column: str, split: str) -> Documents | None:
    """Documents of a file, folder or glob pattern; None if nothing has that name."""
    path = Path(source)
    _require_no_cache(path)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _not_empty(Rows(_saved(path, split), column, source), source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if kind(p) in SUFFIXES and p.is_file())
    else:
        matches = map(Path, sorted(glob.glob(source, recursive=True)))
        files = [path] if path.is_file() else [match for match in matches if match.is_file()]
    is_path = source.startswith(("/", ".")) or kind(path) in SUFFIXES or path.is_dir()
    if not files and is_path:
        raise ValueError(
            f"Expected argument `text` to name files but there is none at {source}: check the path "
            f"({', '.join(SUFFIXES)} files are read)."
        )
    return _joined([open_file(file, column) for file in files], source) if files else None


def _require_no_cache(path: Path) -> None:
    if (path / "manifest.json").is_file():
        raise ValueError(
            f"Expected argument `text` to name text but {path} is a cache of activations: train on "
            f"it by `CachedDataModule({str(path)!r})`, `--data CachedDataModule` on the command "
            "line."
        )


def _joined(parts: Sequence[Documents], source: str) -> Documents:
    """Several sequences of documents, one after the other."""
    return _not_empty(ConcatDataset(parts), source)  # type: ignore[arg-type]


def _not_empty(documents: Documents, source: str) -> Documents:
    if len(documents) == 0:
        raise ValueError(
            f"Expected argument `text` to hold documents but {source} has none: give more text."
        )
    return documents


def _saved(path: Path, split: str) -> Any:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # the readers raise errors of many types
        raise ValueError(
            f"Could not read the saved data set {path}: {error}. Save or copy it again."
        ) from error
    return _split(saved, split, str(path)) if isinstance(saved, Mapping) else saved


def _split(splits: Mapping[str, Any], split: str, source: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"Expected argument `text_split` to be one of {[*splits]} but got `{split}` for "
            f"{source}."
        )
    return splits[split]


def _open_hub(name: str, column: str, split: str, streaming: bool, seed: int) -> Corpus:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Could not open `text`={name}: there is no such file or folder, and the hub did not "
            f"give it. Check the name and the network. The hub's answer: {error}"
        ) from error
    return _open_rows(rows, column, split, seed, name)


def _streamed(rows: Any, column: str, source: str) -> StreamedCorpus:
    first = next(iter(rows), None)
    if isinstance(first, Mapping) and column not in first:
        raise ValueError(
            f"Expected argument `text_column` to be one of {[*first]} but got `{column}` for "
            f"{source}."
        )
    return StreamedCorpus(rows, column, source)
