import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from lightning_sae.data import encoding, long_text, tokens
from lightning_sae.data.documents import Document, held_out, named
from lightning_sae.data.encoding import Encoder
from lightning_sae.data.text import IndexedCorpus
from lightning_sae.data.tokens import TokenBlocks


class Encoding(NamedTuple):
    ids: list[int]

    def token_to_chars(self, i: int) -> tuple[int, int]:
        return i, i + 1


class Encoded(dict[str, Any]):
    @property
    def encodings(self) -> list[Encoding]:
        return [Encoding(ids) for ids in self["input_ids"]]


class Letters:
    """A tokenizer whose tokens are code points; BOS comes first unless it is told otherwise.

    It notes the texts of every call.
    """

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    is_fast = True

    def __init__(self) -> None:
        self.calls: list[str | list[str]] = []

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True
    ) -> Encoded:
        self.calls.append(text)
        bos = [0] * add_special_tokens
        texts = [text] if isinstance(text, str) else text
        ids = [bos + [ord(letter) for letter in text.encode().decode()] for text in texts]
        return Encoded(input_ids=ids[0] if isinstance(text, str) else ids)


class InOrder:
    """Texts that come in the same order in every epoch."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        return iter([named(text) for text in self.texts[start:]])


def blocks_of(corpus: Any, context_length: int = 4, **arguments: Any) -> TokenBlocks:
    settings = {"held_out_fraction": 0.0, "part_held_out": False, **arguments}
    marks = {k: settings.pop(k) for k in ("document_start", "separator") if k in settings}
    return TokenBlocks(corpus, Encoder(Letters(), **marks), context_length, **settings)


def letters(n: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(n)]


def documents_in_a_pass(corpus: Any, **arguments: Any) -> list[str]:
    """The one-letter documents that blocks give before the second pass over the text."""
    blocks = blocks_of(corpus, 1, **arguments)
    found: list[int] = []
    while True:
        token = blocks.read(1).item()
        if blocks.epoch > 0:
            return [chr(t) for t in found if t > 0]
        found.append(int(token))


def test_documents_are_packed_each_after_a_bos_and_over_and_over() -> None:
    blocks = blocks_of(InOrder("abc", "de", "fghi", "j"))
    a, b, c, d, e, f, g, h, i, j = range(ord("a"), ord("k"))
    expected = [[0, a, b, c], [0, d, e, 0], [f, g, h, i], [0, j, 0, a], [b, c, 0, d]]
    assert blocks.read(2).tolist() == expected[:2]
    assert blocks.epoch == 0
    assert blocks.read(3).tolist() == expected[2:]
    assert blocks.epoch == 1
    assert blocks.read(1).dtype == torch.int64


def test_a_document_longer_than_the_context_goes_on_in_the_next_block() -> None:
    assert blocks_of(InOrder("aaaaaa")).read(2).tolist() == [[0, 97, 97, 97], [97, 97, 97, 0]]


def written(blocks: TokenBlocks, n: int) -> list[str]:
    """Blocks as strings, with ^ for BOS, $ for EOS and _ for padding."""
    marks = {0: "^", 1: "$", ~0: "_"}
    return ["".join(marks.get(t) or chr(t) for t in block) for block in blocks.read(n).tolist()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["^abc", "^def", "ghij", "klm^", "n^ab"]),
        ({"document_start": "none"}, ["abc$", "defg", "hijk", "lm$n", "abc$"]),
        (
            {"document_start": "none", "separator": "none"},
            ["abcd", "efgh", "ijkl", "mnab", "cdef"],
        ),
        ({"document_start": "eos"}, ["$abc", "$def", "ghij", "klm$", "n$ab"]),
        ({"separator": "eos"}, ["^abc", "^def", "ghij", "klm$", "^n$^"]),
        ({"document_start": "none", "separator": "+"}, ["abc+", "defg", "hijk", "lm+n", "abc+"]),
        ({"keep_rest": False}, ["^abc", "^def", "^n^a", "^def", "^n^a"]),
        ({"pack": False}, ["^abc", "^def", "ghij", "klm_", "^n__"]),
        ({"pack": False, "keep_rest": False}, ["^abc", "^def", "^n__", "^abc", "^def"]),
        ({"pack": False, "document_start": "none"}, ["abc_", "defg", "hijk", "lm__", "n___"]),
        ({"keep_rest": False, "separator": "eos"}, ["^abc", "^def", "^n$^", "^def", "^n$^"]),
        ({"keep_rest": False, "separator": "++"}, ["^abc", "^def", "^n++", "^abc", "^def"]),
    ],
)
def test_what_stands_round_documents_is_the_users_to_say(
    arguments: dict[str, Any], expected: list[str]
) -> None:
    blocks = blocks_of(InOrder("abc", "defghijklm", "n"), **arguments)
    assert written(blocks, 5) == expected


def test_a_mark_never_stands_beside_itself() -> None:
    own = InOrder("\0ab", "cd\1", "\0", "e")
    assert written(blocks_of(own, 10, separator="eos"), 1) == ["^ab$^cd$^e"]
    ends = InOrder("ab\0", "cd\0")  # BOS is at the end of each document
    assert written(blocks_of(ends, 7), 1) == ["^ab^cd^"]


def test_rows_without_tokens_are_skipped_counted_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [named(content, f"row {i}") for i, content in enumerate(["ab", None, "", 5, "\0", "c"])]
    blocks = blocks_of(IndexedCorpus(rows), 5)
    texts = {written(blocks, 1)[0] for _ in range(4)}
    assert texts <= {"^ab^c", "^c^ab"}
    assert blocks.skipped >= 4 * 3
    assert blocks.state_dict()["skipped"] == blocks.skipped
    assert len([m for m in caplog.messages if "it is skipped" in m]) == 1


def test_an_empty_module_of_the_standard_library_is_a_document() -> None:
    class Modules:
        def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
            texts = ["a", "", "b"][start:]
            return iter([Document(t, t, may_be_empty=True) for t in texts])

    assert written(blocks_of(Modules(), 7), 1) == ["^a^^b^a"]


def test_rows_that_never_give_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PATIENCE", 20)
    many = IndexedCorpus([named(5, f"row {i}") for i in range(1000)])
    with pytest.raises(ValueError, match="its 20 documents gave none .*20 rows were skipped, the"):
        blocks_of(many).read(1)
    one = IndexedCorpus([named("abc")] + [named("")] * 19)
    assert len(blocks_of(one).read(30)) == 30


def test_a_text_that_is_gone_in_the_second_pass_is_refused() -> None:
    class Once:
        def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
            return iter([named("abc")] if number == 0 else [])

    blocks = blocks_of(Once())
    blocks.read(1)
    with pytest.raises(ValueError, match="its 0 documents gave none"):
        blocks.read(1)


def test_token_ids_of_another_model_are_found_in_the_first_rows() -> None:
    rows = [named([1, 2, 3], f"row {i}") for i in range(99)] + [named([1, 70], "row 99")]
    settings: dict[str, Any] = {"held_out_fraction": 0.0, "part_held_out": False}
    blocks = TokenBlocks(IndexedCorpus(rows), Encoder(None, vocabulary=64), 4, **settings)
    with pytest.raises(ValueError, match="from 0 to 63 but row 99 holds 70"):
        blocks.require_ids()
    blocks_of(InOrder("abc")).require_ids()


def test_training_and_held_out_documents_are_disjoint_and_together_all() -> None:
    corpus = IndexedCorpus([named(text) for text in letters(50)])
    parts = [
        documents_in_a_pass(corpus, held_out_fraction=0.3, part_held_out=part)
        for part in (False, True)
    ]
    assert sorted(parts[0] + parts[1]) == letters(50)
    assert set(parts[1]) == {t for t in letters(50) if held_out(named(t).name, 0.3)}
    assert 5 < len(parts[1]) < 25


def test_copies_of_a_document_are_on_one_side() -> None:
    corpus = IndexedCorpus([named(text) for text in letters(20) * 3])
    parts = [
        set(documents_in_a_pass(corpus, held_out_fraction=0.5, part_held_out=part))
        for part in (False, True)
    ]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("part_held_out", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_documents_of_a_pass(part_held_out: bool, world_size: int) -> None:
    corpus = IndexedCorpus([named(text) for text in letters(50)])
    split: dict[str, Any] = {"held_out_fraction": 0.4, "part_held_out": part_held_out}
    ranks = [
        documents_in_a_pass(corpus, rank=rank, world_size=world_size, **split)
        for rank in range(world_size)
    ]
    assert all(ranks)
    together = [document for rank in ranks for document in rank]
    assert len(together) == len(set(together))
    assert sorted(together) == sorted(documents_in_a_pass(corpus, **split))


@pytest.mark.parametrize("context_length", [1, 3, 7])
@pytest.mark.parametrize("rank", [0, 1])
def test_reading_goes_on_exactly_from_any_place(context_length: int, rank: int) -> None:
    corpus = IndexedCorpus([named(letter * (i % 5)) for i, letter in enumerate(letters(12))])
    settings = {"held_out_fraction": 0.3, "rank": rank, "world_size": 2}
    for n_before in range(25):
        blocks = blocks_of(corpus, context_length, **settings)
        for _ in range(n_before):
            blocks.read(1)
        file = io.BytesIO()
        torch.save(blocks.state_dict(), file)
        expected = blocks.read(20)
        assert blocks.epoch > 0, "the places lie on both sides of an epoch's end"
        file.seek(0)
        resumed = blocks_of(corpus, context_length, **settings)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(resumed.read(20), expected)
        assert (resumed.epoch, resumed.document) == (blocks.epoch, blocks.document)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"pack": False},
        {"keep_rest": False},
        {"pack": False, "keep_rest": False},
        {"separator": "eos"},
        {"rank": 1, "world_size": 2},
    ],
)
def test_reading_goes_on_exactly_within_long_documents(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "WINDOW", 32)
    monkeypatch.setattr(long_text, "OVERLAP", 16)
    monkeypatch.setattr(encoding, "PIECE", 20)
    contents = ["".join(letters(20)) * 4 + str(i) for i in range(6)]
    corpus = IndexedCorpus([named(c) for c in contents] + [named([9] * 30), named("")] * 2)
    whole = blocks_of(corpus, 7, **arguments).read(200)
    blocks = blocks_of(corpus, 7, **arguments)
    for n_before in range(60):
        state = blocks.state_dict()
        assert len(state["rest"]) < 7 + 32 + 16
        resumed = blocks_of(corpus, 7, **arguments)
        resumed.load_state_dict(state)
        assert torch.equal(resumed.read(30), whole[n_before : n_before + 30])
        blocks.read(1)


def test_a_state_without_pieces_is_of_whole_documents() -> None:
    blocks = blocks_of(InOrder("abc", "defgh", "i"))
    blocks.load_state_dict({"epoch": 0, "document": 2, "rest": torch.tensor([103, 104])})
    assert written(blocks, 2) == ["gh^i", "^abc"]


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        (letters(9), {"part_held_out": True}, "held-out documents.*its 9 documents.*is 0.0"),
        (letters(9), {"held_out_fraction": 1.0}, "training documents.*is 1.0"),
        ([], {}, "its 0 documents"),
        (letters(1), {"rank": 1, "world_size": 2}, "training documents"),
    ],
)
def test_text_without_a_document_for_the_part_is_refused_with_the_remedy(
    texts: list[str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*give more text.*or set `validation_text`"):
        blocks_of(InOrder(*texts), **arguments).read(1)


def tokenised(calls: list[Any]) -> list[list[str]]:
    """The texts of each call of a tokenizer, as lists."""
    return [[call] if isinstance(call, str) else call for call in calls]


def test_short_documents_are_tokenised_together_few_at_first() -> None:
    blocks = blocks_of(InOrder(*letters(26)), 1)
    one_by_one = blocks_of(InOrder(*letters(26)), 1)
    one_by_one.encoder.tokenizer.is_fast = False
    assert torch.equal(blocks.read(60), one_by_one.read(60))
    sizes = [len(texts) for texts in tokenised(blocks.encoder.tokenizer.calls)]
    assert [n for n in sizes if n > 1] == [2, 4, 8, 11, 2, 4]  # 26 in a pass
    assert {type(call) for call in one_by_one.encoder.tokenizer.calls} == {str}


def test_only_documents_of_this_split_and_process_are_tokenised() -> None:
    arguments: dict[str, Any] = {"held_out_fraction": 0.4, "rank": 1, "world_size": 2}
    texts = letters(30)
    blocks = blocks_of(InOrder(*texts), 1, **arguments, document_start="bos")
    while blocks.epoch == 0:
        blocks.read(1)
    read = {text for call in tokenised(blocks.encoder.tokenizer.calls) for text in call}
    mine = {text for text in texts[1::2] if not held_out(named(text).name, 0.4)}
    assert read == mine
    assert 3 < len(mine) < 15


def test_a_text_that_cannot_be_read_is_skipped_in_its_turn_and_the_others_are_read() -> None:
    half = "\ud800"  # half of a character
    blocks = blocks_of(InOrder("a", "b", half, "c", "", "d"), 2)
    assert written(blocks, 4) == ["^a", "^b", "^c", "^d"]
    assert blocks.skipped == 2
