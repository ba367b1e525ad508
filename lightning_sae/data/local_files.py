"""Documents in local files. Errors give the file, the line and a remedy."""

import hashlib
import json
import mmap
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_sae.data.compressed import COMPRESSIONS, decompressed
from lightning_sae.data.documents import BYTE_ORDER_MARK, Document, Documents, named

MARK = "<|endoftext|>"
"""Separator of the documents in a .txt file."""

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
SUFFIXES = (".txt", *READERS)

READABLE = re.compile(
    r"(large_)?string|string_view|null|struct<role: list.*|extension<arrow.json>"
    r"|(large_|fixed_size_)?list<\w+: (u?int\d+|null|struct<.*|extension<arrow.json>)>.*"
)
"""Arrow types of columns that can hold text, token ids or chats."""

LONG = 2**20
"""In bytes; a longer document of a .txt file is read in pieces."""

FOREIGN = {
    b"\x1f\x8b": "gzip: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "zstd: add .zst to its name",
    b"BZh": "bzip2: add .bz2 to its name",
    b"\xfd7zXZ": "xz: add .xz to its name",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "Parquet: end its name with .parquet",
    b"%PDF": "PDF: extract its text",
    b"\xff\xfe\0\0": "UTF-32: convert it by `iconv -f UTF-32 -t UTF-8`",
    b"\xff\xfe": "UTF-16: convert it by `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it by `iconv -f UTF-16 -t UTF-8`",
}
"""First bytes of files that are not UTF-8, their kind, and the remedy."""


def kind(path: Path) -> str:
    """The suffix that determines how a file is read, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def open_file(path: Path, column: str) -> Documents:
    """Documents of a file.

    Raises:
        ValueError: If it is of an unknown kind, damaged, not UTF-8, or lacks the column.
    """
    if kind(path) not in SUFFIXES:
        raise ValueError(
            f"Expected argument `text` to name {', '.join(SUFFIXES)} files, plain or compressed "
            f"({', '.join(COMPRESSIONS)}), but got {path}: convert it, or rename it if it is "
            "plain text."
        )
    plain = decompressed(path, kind(path))
    if kind(path) != ".parquet":
        _require_utf8(plain, path)
    if kind(path) == ".txt":
        return TextFile(plain)
    return Rows(_table(plain, path), column, str(path))


class FileSpan:
    """A part of a UTF-8 file that is read in pieces as needed; positions are in bytes."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        self.path, self.start, self.end = path, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, part: slice) -> str:
        """The characters that lie completely within a slice of bytes."""
        return self.read(part).decode(errors="ignore")

    def read(self, part: slice) -> bytes:
        """Bytes of a slice."""
        start, stop, _ = part.indices(len(self))
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            return file.read(stop - start)

    def stripped(self) -> "FileSpan":
        """The same span without leading and trailing white space."""
        head, tail = self.read(slice(4096)), self.read(slice(-4096, None))
        start = self.start + len(head) - len(head.lstrip())
        return FileSpan(self.path, start, self.end - len(tail) + len(tail.rstrip()))

    def digest(self) -> str:
        """The name that `named` gives to the whole text."""
        found = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), LONG):
            found.update(self.read(slice(start, start + LONG)))
        return found.hexdigest()


class TextFile:
    """A text file whose documents stand between `<|endoftext|>` marks; only offsets are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans = list(_spans(path, MARK.encode()))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Document:
        span = FileSpan(self.path, *self.spans[index])
        if len(span) > LONG:
            span = span.stripped()
            return Document(span.digest(), span, str(self.path))
        return named(span[:].strip().removeprefix(BYTE_ORDER_MARK).strip(), str(self.path))


class Rows:
    """A column of a `datasets.Dataset`.

    Args:
        rows: The data set.
        column: The column's name.
        source: Name of the data set, for messages.

    Raises:
        ValueError: If there is no such column, or it cannot hold text, token ids or chats.
    """

    def __init__(self, rows: Any, column: str, source: str) -> None:
        require_column(rows, column, source)
        self.rows, self.column, self.source = rows.select_columns([column]), column, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        where = f"row {index + 1} of {self.source}"
        try:
            return named(self.rows[index][self.column], where)
        except UnicodeDecodeError as error:
            raise ValueError(f"Could not read {where}: {error}; write it in UTF-8.") from error


def require_column(rows: Any, column: str, source: str) -> None:
    """Raise a ValueError if rows lack the column, or it cannot hold text, token ids or chats."""
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(
            f"Expected argument `text_column` to be one of {rows.column_names} but got `{column}` "
            f"for {source}."
        )
    if rows.features is None:
        return
    holds = str(rows.features.arrow_schema.field(column).type)
    if not READABLE.fullmatch(holds):
        raise ValueError(
            f"Expected argument `text_column` to name a column of text, token ids or chats but "
            f"`{column}` of {source} holds {holds}: name another column."
        )


def _table(plain: Path, path: Path) -> Any:
    from datasets import load_dataset

    reader = READERS[kind(path)]
    # Words such as `NA` and `null` are text, not missing values.
    csv = {"keep_default_na": False, "sep": "\t" if kind(path) == ".tsv" else ","}
    arguments = csv if reader == "csv" else {}
    try:
        return load_dataset(reader, data_files=_unglobbed(plain), split="train", **arguments)
    except Exception as error:  # of any reader
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = f"{type(cause).__name__} {cause}".split("\n")[0].rstrip(". ")
        empty = "it has no rows" if "corresponds to no data" in said else None
        found = _broken_line(plain) if reader == "json" else None
        raise ValueError(
            f"Could not read {path}: {found or empty or said}. Repair the file, or leave it out."
        ) from error


def _unglobbed(path: Path) -> str:
    """The path as a glob pattern that matches only itself."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def _broken_line(path: Path) -> str | None:
    """What is wrong with a JSON file, as far as can be seen line by line."""
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if rows == 0 and line.lstrip().startswith(b"["):
                return None  # one list of rows
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                said = error.msg.removesuffix(" at")
                return f"line {number} is not JSON ({said}, column {error.colno})"
            if not isinstance(row, dict):
                return f"line {number} is not an object with a column, such as " + '{"text": "..."}'
            rows += bool(row)
    return None if rows else "it has no rows"


def _require_utf8(plain: Path, path: Path) -> None:
    """Raise a ValueError if a file is not UTF-8 or is binary."""
    decoder, line, ended = getincrementaldecoder("utf-8")(), 1, False
    with plain.open("rb") as file:
        beginning = file.read(8)
        file.seek(0)
        while not ended:
            chunk = file.read(LONG)
            ended = not chunk
            try:
                text = decoder.decode(chunk, final=ended)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                byte = error.object[error.start]
                _refuse(path, beginning, line, f"is not (byte 0x{byte:02x})", "LATIN1")
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                _refuse(path, beginning, line, "holds a zero byte", "UTF-16LE")
            line += text.count("\n")


def _refuse(path: Path, beginning: bytes, line: int, what: str, encoding: str) -> None:
    for start, remedy in FOREIGN.items():
        if beginning.startswith(start):
            raise ValueError(f"Expected argument `text` to be UTF-8 but {path} is {remedy}.")
    raise ValueError(
        f"Expected argument `text` to be UTF-8 but line {line} of {path} {what}: convert it, such "
        f"as by `iconv -f {encoding} -t UTF-8`, or leave it out."
    )


def _spans(path: Path, separator: bytes) -> Iterator[tuple[int, int]]:
    """Byte ranges of the documents that are more than white space."""
    if path.stat().st_size == 0:
        return
    more_than_space, mark = re.compile(rb"\S"), BYTE_ORDER_MARK.encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = len(mark) if data[: len(mark)] == mark else 0
        while start < len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end
            if more_than_space.search(data, start, end):
                yield start, end
            start = end + len(separator)
