import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from lightning_sae.data import text as text_module
from lightning_sae.data.documents import Document
from lightning_sae.data.local_files import TextFile
from lightning_sae.data.text import Corpus, StreamedCorpus, described, open_text

MARK = "<|endoftext|>"
TEXTS = [f"document {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps converted files; not in the home of who runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def texts(corpus: Corpus, number: int = 0, start: int = 0) -> list[Any]:
    return [document.text for document in corpus.epoch(number, start)]


def texts_in(file: TextFile) -> list[str]:
    return [file[i].text for i in range(len(file))]


def write_txt(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(MARK.join(documents), encoding="utf-8")
    return path


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d, "n": 1}) + "\n" for d in documents))
    return path


def write_parquet(path: Path, documents: list[str]) -> Path:
    Dataset.from_dict({"text": documents}).to_parquet(str(path))
    return path


def one_txt(folder: Path) -> Path:
    return write_txt(folder / "a.txt", TEXTS)


def one_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", TEXTS)


def one_parquet(folder: Path) -> Path:
    return write_parquet(folder / "a.parquet", TEXTS)


def saved_dataset(folder: Path) -> Path:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    splits = {"train": TEXTS, "test": ["not this one"]}
    saved = DatasetDict({name: Dataset.from_dict({"text": t}) for name, t in splits.items()})
    saved.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def folder_of_all_kinds(folder: Path) -> Path:
    write_txt(folder / "deep" / "a.txt", TEXTS[:4])
    write_jsonl(folder / "b.jsonl", TEXTS[4:8])
    write_parquet(folder / "c.parquet", TEXTS[8:])
    (folder / "notes.md").write_text("not a document")
    return folder


def glob_pattern(folder: Path) -> str:
    write_txt(folder / "a.txt", TEXTS[:4])
    write_txt(folder / "b.txt", TEXTS[4:])
    write_txt(folder / "other.txt", ["not this one"])
    return str(folder / "[ab].txt")


def list_of_files(folder: Path) -> list[Path]:
    return [write_txt(folder / "a.txt", TEXTS[:7]), write_txt(folder / "b.txt", TEXTS[7:])]


def name_that_looks_like_a_pattern(folder: Path) -> Path:
    return write_txt(folder / "a[1].txt", TEXTS)


@pytest.mark.parametrize(
    "write",
    [
        one_txt,
        one_jsonl,
        one_parquet,
        saved_dataset,
        saved_splits,
        folder_of_all_kinds,
        glob_pattern,
        list_of_files,
        name_that_looks_like_a_pattern,
    ],
)
def test_every_kind_of_source_gives_the_same_documents(
    write: Callable[[Path], str | Path | list[str | Path]], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    corpus = open_text(write(tmp_path / "in"))
    assert sorted(texts(corpus)) == sorted(TEXTS)


def test_a_relative_path_and_one_from_home_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_txt(tmp_path / "a.txt", TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts(open_text("a.txt")) == texts(open_text("~/a.txt"))


def test_column_and_split_are_chosen_by_name(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["no"], "body": ["yes"]})
    DatasetDict({"train": rows.rename_columns({"body": "b"}), "dev": rows}).save_to_disk(
        str(tmp_path / "saved")
    )
    assert texts(open_text(tmp_path / "saved", column="body", split="dev")) == ["yes"]
    with pytest.raises(ValueError, match=r"`text_split` to be one of \['train', 'dev'\] .*`test`"):
        open_text(tmp_path / "saved", split="test")


def test_a_text_file_is_split_at_the_mark_and_blank_documents_are_dropped(tmp_path: Path) -> None:
    path = write_txt(
        tmp_path / "a.txt", ["one", "", " \n\t", "\n two\nlines \n", "drei é 日本", ""]
    )
    assert texts_in(TextFile(path)) == [
        "one",
        "two\nlines",
        "drei é 日本",
    ]
    assert TextFile(path).spans[0] == (0, 3)


def test_a_text_file_keeps_offsets_and_no_text(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "a.txt", ["first", "second"])
    file = TextFile(path)
    assert vars(file) == {"path": path, "spans": [(0, 5), (18, 24)]}
    write_txt(path, ["other", "change"])  # of the same length
    assert texts_in(file) == ["other", "change"]


def test_random_text_files_agree_with_a_plain_split(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(30):
        whole = "".join(rng.choices(["a", "é", " ", "\n", MARK, "<|end", "<"], k=40))
        write_txt(tmp_path / "a.txt", [whole])
        expected = [part.strip() for part in whole.split(MARK) if part.strip()]
        assert texts_in(TextFile(tmp_path / "a.txt")) == expected


def test_every_epoch_is_a_permutation_of_its_own_that_the_seed_fixes(tmp_path: Path) -> None:
    path = one_txt(tmp_path)
    corpus = open_text(path, seed=3)
    orders = [texts(corpus, number) for number in range(4)]
    assert all(sorted(order) == sorted(TEXTS) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert TEXTS not in orders
    assert [texts(open_text(path, seed=3), number) for number in range(4)] == orders
    assert texts(open_text(path, seed=9)) != orders[0]


@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_an_epoch_can_be_entered_anywhere(tmp_path: Path, start: int) -> None:
    corpus = open_text(one_txt(tmp_path))
    assert texts(corpus, 2, start) == texts(corpus, 2)[start:]


def test_a_document_is_named_by_its_text_alone(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", ["same", "one"])
    write_jsonl(tmp_path / "b.jsonl", ["same", "other"])
    documents = list(open_text(tmp_path).epoch(0))
    names = {(document.name, document.text) for document in documents}
    assert len(documents) == 4
    assert len(names) == len({name for name, _ in names}) == 3


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_can_be_entered_anywhere_in_every_epoch(shuffled: bool) -> None:
    rows = Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()
    rows = rows.shuffle(seed=0, buffer_size=6) if shuffled else rows
    corpus = StreamedCorpus(rows, "body")
    first, second = texts(corpus, 0), texts(corpus, 1)
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert (first != second) == shuffled
    assert texts(corpus, 1, 5) == second[5:]
    assert texts(corpus, 0) == first


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_file_is_asked_of_the_hub(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
        asked.append((name, split, streaming))
        rows = Dataset.from_dict({"text": TEXTS})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_text("someone/stories", split="validation", streaming=streaming)
    assert asked == [("someone/stories", "validation", streaming)]
    assert isinstance(corpus, StreamedCorpus) == streaming
    assert sorted(texts(corpus)) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"`text_column` to be one of \['text'\] but got `body`"):
        open_text("someone/stories", column="body", streaming=streaming)


def test_embedded_is_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("a.py", "a = 1"), Document("b.py", "b = 1")]
    monkeypatch.setattr(text_module, "standard_library_documents", lambda: documents)
    assert sorted(open_text("embedded").epoch(0)) == documents


@pytest.mark.parametrize("write", [one_jsonl, one_parquet, saved_dataset])
def test_a_wrong_column_is_refused_with_those_that_there_are(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"`text_column` to be one of \['text'.* got `body`"):
        open_text(write(tmp_path), column="body")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/a.txt", "none at /nowhere/a.txt: check the path"),
        ("./*.parquet", r"none at ./\*.parquet: check the path"),
        ("./stories", "none at ./stories: check the path"),
        ("a.jsonl", "none at a.jsonl: check the path"),
        ("someone/stories", "no such file or folder.*Check the name and the network"),
    ],
)
def test_what_cannot_be_found_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_text(name)


def test_two_stars_in_a_pattern_reach_files_at_any_depth(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", TEXTS[:4])
    write_txt(tmp_path / "one" / "b.txt", TEXTS[4:8])
    (tmp_path / "one" / "two").mkdir()
    write_txt(tmp_path / "one" / "two" / "c.txt", TEXTS[8:])
    assert sorted(texts(open_text(f"{tmp_path}/**/*"))) == sorted(TEXTS)


def test_a_file_of_another_kind_or_a_missing_one_in_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match="to name .txt, .jsonl, .* but got .*bin"):
        open_text(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"to list files but there is no \['missing'\]"):
        open_text([one_txt(tmp_path), "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none at .*empty"):
        open_text(tmp_path / "empty")


class Again:
    """Rows that can be iterated again and again, without a length."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": text} for text in TEXTS],
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}),
        Again([{"text": text} for text in TEXTS]),
        Again(TEXTS),
    ],
)
def test_rows_from_python_are_read_and_entered_anywhere(rows: Any) -> None:
    corpus = open_text(rows)
    assert sorted(texts(corpus)) == sorted(TEXTS)
    assert texts(corpus, 1, 5) == texts(corpus, 1)[5:]
    assert described(rows) == f"a Python {type(rows).__name__}"


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [3]],
        ([1, 2], [3]),
        Again([torch.tensor([1, 2]), [3]]),
        Dataset.from_dict({"text": [[1, 2], [3]]}),
        Dataset.from_dict({"text": [[1, 2], [3]]}).with_format("torch"),
    ],
)
def test_rows_may_be_token_ids(rows: Any) -> None:
    assert sorted(texts(open_text(rows))) == [[1, 2], [3]]
    assert sorted(texts(open_text(torch.tensor([[5, 6], [7, 8]])))) == [[5, 6], [7, 8]]


class Once:
    def __init__(self) -> None:
        self.rows = iter(TEXTS)

    def __iter__(self) -> Iterator[str]:
        return self.rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((text for text in TEXTS), "iterable more than once but got a Python generator"),
        (Once(), "iterable more than once but got a Python Once: give a list"),
        ([], "to hold documents but a Python list has none"),
        (Again([{"body": "a"}]), r"`text_column` to be one of \['body'\] but got `text`"),
        (Dataset.from_dict({"text": [1]}), "`text` of a Python Dataset holds int64"),
        (["a text\nof lines"], "to name files but got .*: texts themselves are given as rows"),
        ("long " * 300, "to name files but got 'long .*given as rows"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_text(rows)


def test_where_a_row_stands_is_counted_from_one(tmp_path: Path) -> None:
    wheres = [d.where for d in open_text(Again(["a", None, "b"])).epoch(0, 1)]
    assert wheres == ["row 2 of a Python Again", "row 3 of a Python Again"]
    path = one_jsonl(tmp_path)
    where = {d.text: d.where for d in open_text(path).epoch(0)}
    assert where["document 3"] == f"row 4 of {path}"


def test_what_text_is_from_is_said_in_plain_values() -> None:
    assert described(Path("a.txt")) == "a.txt"
    assert described(("a.txt", Path("b.txt"))) == ["a.txt", "b.txt"]
    assert described([{"text": "a"}]) == "a Python list"
