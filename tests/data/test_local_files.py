import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from datasets import Dataset

from lightning_sae.data import local_files
from lightning_sae.data.documents import named
from lightning_sae.data.local_files import FileSpan, TextFile
from lightning_sae.data.text import open_text

TEXTS = [f"document {i}" for i in range(12)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
TXT = "<|endoftext|>".join(TEXTS)


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps converted files; not in the home of who runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def texts(path: Any, **arguments: Any) -> list[Any]:
    return sorted(document.text for document in open_text(path, **arguments).epoch(0))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "n,text\n1,one\n2,NA\n3,\n4,null\n", ["", "NA", "null", "one"]),
        ("a.tsv", 'text\tn\none, two\t1\n"a\nb"\t2\n', ["a\nb", "one, two"]),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]), ["one", "two"]),
        ("A.TXT", "one<|endoftext|>two", ["one", "two"]),
        ("a.txt", "\ufeffone<|endoftext|>\ufefftwo", ["one", "two"]),
        ("a.jsonl", '\ufeff{"text": "one"}\n\n{"text": "\ufefftwo"}\n', ["one", "two"]),
    ],
)
def test_files_are_read_as_what_they_say(
    name: str, content: str, expected: list[str], tmp_path: Path
) -> None:
    assert texts(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
@pytest.mark.parametrize(("name", "content"), [("a.txt", TXT), ("a.jsonl", JSONL)])
def test_compressed_files_are_read_as_they_are_now(
    name: str, content: str, suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = write(tmp_path / (name + suffix), compress(content.encode()))
    assert texts(path) == sorted(TEXTS)
    write(path, compress(content.replace("document", "another").encode()))
    assert texts(path)[0] == "another 0"


def cut_parquet(path: Path) -> bytes:
    Dataset.from_dict({"text": TEXTS}).to_parquet(str(path))
    return path.read_bytes()[:-20]


def latin_parquet(path: Path) -> bytes:
    text = pa.array([b"caf\xe9"] * 2).view(pa.string())  # what a careless writer says it is
    pq.write_table(pa.table({"text": text}), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", f"é\nb\n{TXT}\n\u00ff".encode("latin-1"), "line 1 of .*a.txt is not .byte 0xe9"),
        ("a.txt", b"one\ntwo\nca\xc3", "line 3 of .*a.txt is not .*iconv"),
        ("a.txt", b"one\ntwo\0", "line 2 of .*a.txt holds a zero byte.*UTF-16LE"),
        ("a.txt", TXT.encode("utf-16"), "a.txt is UTF-16: convert it by `iconv -f UTF-16"),
        ("a.txt", TXT.encode("utf-32"), "a.txt is UTF-32: convert it"),
        ("a.jsonl", JSONL.encode("utf-16"), "a.jsonl is UTF-16: convert it"),
        ("a.txt", gzip.compress(TXT.encode(), mtime=0), "a.txt is gzip: add .gz to its name"),
        ("a.jsonl", b"PAR1\xff", "a.jsonl is Parquet: end its name"),
        (
            "a.txt.gz",
            gzip.compress(TXT.encode(), mtime=0)[:-20],
            "a.txt.gz: .*It is cut off or damaged",
        ),
        ("a.jsonl.gz", JSONL.encode(), "a.jsonl.gz: Not a gzipped file.*damaged"),
        ("a.jsonl", JSONL + '{"text": "br', "a.jsonl: line 13 is not JSON .Unterminated string"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl: line 2 is not an object with a column"),
        ("a.jsonl", "", "a.jsonl: it has no rows. Repair the file"),
        ("a.jsonl", "\n\n", "a.jsonl: it has no rows"),
        ("a.json", "[]", "a.json: it has no rows"),
        ("a.csv", "text,n\na,1\nb,2,3\n", "a.csv: .*line 3"),
        ("a.csv", "text\n", "a.csv: it has no rows"),
        ("a.txt", " \n<|endoftext|>", "to hold documents but .*a.txt has none"),
        ("a.csv", "text\n1\n", "`text_column` to name a column of text.*a.csv holds int64"),
        ("a.jsonl", '{"text": [1.5]}\n', "holds list<item: double>: name another column"),
        ("a.jsonl", '{"text": {"a": 1}}\n', "holds struct<a: int64>: name another column"),
        ("a.parquet", cut_parquet, "Could not read .*a.parquet: .*Repair the file"),
        ("a.parquet", latin_parquet, "row [12] of .*a.parquet.*write it in UTF-8"),
    ],
)
def test_damaged_and_foreign_files_are_refused_with_line_and_remedy(
    name: str, content: str | bytes | Callable[[Path], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, content(path) if callable(content) else content)
    with pytest.raises(ValueError, match=message) as found:
        texts(path)
    assert "\n" not in str(found.value)


def test_a_folder_with_nothing_readable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "papers").mkdir()
    write(tmp_path / "papers" / "a.pdf", b"%PDF")
    monkeypatch.chdir(tmp_path)
    for name in ("papers", tmp_path / "papers"):
        with pytest.raises(ValueError, match="there is none at .*papers: check the path .*.jsonl"):
            open_text(name)


def test_a_damaged_saved_data_set_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    write(file, file.read_bytes()[:50])
    with pytest.raises(ValueError, match="saved data set .*saved: .*Save or copy it again"):
        open_text(tmp_path / "saved")


def test_a_long_document_of_a_file_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "ein é " * 50
    path = write(tmp_path / "a.txt", f"short<|endoftext|>\n {text}\n<|endoftext|>")
    expected = named(text.strip())
    assert TextFile(path)[1] == expected._replace(where=str(path))
    monkeypatch.setattr(local_files, "LONG", 100)
    short, long = (TextFile(path)[i] for i in range(2))
    assert short.text == "short"
    assert isinstance(long.text, FileSpan)
    assert long.name == expected.name
    assert long.text[:] == expected.text
    begin = expected.text.encode().index("é".encode())
    assert long.text[: begin + 1] == "ein "  # half a character is none
    assert long.text[begin + 1 : begin + 7] == " ein "
