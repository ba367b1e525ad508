"""Which kinds of text give the tokens they should: `python -m benchmarks.text`.

Six documents are written as each kind of text, read, and compared with the tokens that the embedded
model's tokenizer makes of each: `exact`, or `WRONG`. What is damaged or foreign has to be
`refused`, with a ValueError. The tables are those of `docs/text.md`.
"""

import bz2
import gzip
import json
import lzma
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.encoding import PADDING, Encoder
from lightning_sae.data.pretrained import load_tokenizer
from lightning_sae.data.text import open_text
from lightning_sae.data.tokens import TokenBlocks

DOCUMENTS = [
    "A first one.",
    "Two\nlines, in one document.",
    "Quotes: \"a\", 'b', and a comma,",
    "Ümläute, 漢字, 🙂",
    "spaces  within,\tand a tab",
    "x" * 300,
]
TOKENIZER = load_tokenizer(str(EMBEDDED_MODEL), {})
IDS = [
    [TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    for text in DOCUMENTS
]
LONGEST = 512
TXT = "<|endoftext|>".join(DOCUMENTS).encode()
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
TABLE = Dataset.from_dict({"text": DOCUMENTS})

Write = Callable[[Path], Any]
"""Writes a text into a folder, and gives what `text` is to be."""


class Again:
    """An object of one's own that can be iterated again and again."""

    def __iter__(self) -> Iterator[str]:
        return iter(DOCUMENTS)


def file(name: str, content: bytes) -> Write:
    """Writer of one file."""

    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return write


def parquet(folder: Path) -> Path:
    """A Parquet file."""
    TABLE.to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def saved(folder: Path) -> Path:
    """A folder of `save_to_disk`."""
    TABLE.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def csv(separator: str) -> bytes:
    """A table with quoted fields."""
    quoted = ('"' + text.replace('"', '""') + '"' for text in DOCUMENTS)
    return "\n".join([f"n{separator}text", *(f"1{separator}{text}" for text in quoted)]).encode()


def folder_of_two(folder: Path) -> Path:
    """A folder with a text file and a table below it."""
    file("a.txt", "<|endoftext|>".join(DOCUMENTS[:3]).encode())(folder)
    file("below/b.jsonl", b"\n".join(JSONL.splitlines()[3:]))(folder)
    return folder


def pattern(folder: Path) -> str:
    """A glob pattern."""
    folder_of_two(folder)
    return str(folder / "**" / "*.*")


EXACT: dict[str, Write] = {
    "`.txt`": file("a.txt", TXT),
    "`.txt` with a byte order mark": file("a.txt", b"\xef\xbb\xbf" + TXT),
    "`.jsonl`": file("a.jsonl", JSONL),
    "`.json`": file("a.json", json.dumps([{"text": text} for text in DOCUMENTS]).encode()),
    "`.csv`": file("a.csv", csv(",")),
    "`.tsv`": file("a.tsv", csv("\t")),
    "`.parquet`": parquet,
    "`.txt.gz`": file("a.txt.gz", gzip.compress(TXT)),
    "`.jsonl.bz2`": file("a.jsonl.bz2", bz2.compress(JSONL)),
    "`.jsonl.xz`": file("a.jsonl.xz", lzma.compress(JSONL)),
    "a folder of `save_to_disk`": saved,
    "a folder of files": folder_of_two,
    "a glob pattern": pattern,
    "`Dataset`": lambda _: TABLE,
    "`IterableDataset`": lambda _: IterableDataset.from_generator(lambda: iter(TABLE)),
    "rows: dictionaries": lambda _: list(TABLE),
    "rows: token ids": lambda _: IDS,
    "an iterable of texts": lambda _: Again(),
    "empty and null rows between": lambda _: [
        row for text in DOCUMENTS for row in ({"text": ""}, {"text": text}, {"text": None})
    ],
    "texts that begin with BOS": lambda _: [
        {"text": TOKENIZER.bos_token + text} for text in DOCUMENTS
    ],
}

REFUSED: dict[str, Write] = {
    "`.jsonl` with a broken last line": file("a.jsonl", JSONL[:-20]),
    "an empty `.jsonl`": file("a.jsonl", b""),
    "a truncated `.parquet`": lambda folder: file("b.parquet", parquet(folder).read_bytes()[:-200])(
        folder
    ),
    "a truncated `.gz`": file("a.txt.gz", gzip.compress(TXT)[:-30]),
    "UTF-16": file("a.txt", TXT.decode().encode("utf-16")),
    "Latin-1": file("a.txt", "Ümläute".encode("latin-1")),
    "zero bytes": file("a.txt", TXT + bytes(40)),
    "gzip named `.txt`": file("a.txt", gzip.compress(TXT)),
    "a folder with nothing readable": lambda folder: file("x/a.bin", b"0")(folder).parent,
    "a column of numbers": lambda _: [{"text": 1}],
    "a row without the column": lambda _: [{"other": "text"}],
    "ids that the model does not know": lambda _: [[1, 10**6]],
    "a generator": lambda _: (text for text in DOCUMENTS),
}


def tokens_of(text: Any) -> list[list[int]]:
    """The tokens of each document, in the order of the text, without padding."""
    encoder = Encoder(TOKENIZER, vocabulary=len(TOKENIZER))
    blocks = TokenBlocks(
        open_text(text), encoder, LONGEST, pack=False, held_out_fraction=0, part_held_out=False
    )
    blocks.require_ids()
    found = blocks.read_first_epoch(len(DOCUMENTS) + 1)
    return [[token for token in block.tolist() if token != PADDING] for block in found]


def verdict(write: Write) -> str:
    """`exact`, `refused` with the reason, or `WRONG`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = tokens_of(write(Path(folder)))
        except ValueError as error:
            return "refused: " + str(error).replace(f"{folder}/", "").splitlines()[0]
    return "exact" if sorted(found) == sorted(IDS) else "WRONG"


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        datasets.disable_progress_bars()
        for title, kinds in (("kind of text", EXACT), ("damaged or foreign", REFUSED)):
            sys.stdout.write(f"| {title} | |\n|---|---|\n")
            for name, write in kinds.items():
                sys.stdout.write("| {} | {} |\n".format(name, verdict(write).replace("|", "\\|")))
            sys.stdout.write("\n")


if __name__ == "__main__":
    main()
