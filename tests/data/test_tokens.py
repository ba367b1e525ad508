import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_sae.data.documents import Document, held_out, named
from lightning_sae.data.encoding import Encoder
from lightning_sae.data.text import IndexedCorpus
from lightning_sae.data.tokens import TokenBlocks


class Letters:
    """A tokenizer whose tokens are code points; BOS comes first unless it is told otherwise."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    is_fast = False

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}


class InOrder:
    """Texts that come in the same order in every epoch."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def epoch(self, number: int, start: int = 0) -> Iterator[Document]:
        return iter([named(text) for text in self.texts[start:]])


def blocks_of(corpus: Any, context_length: int = 4, **arguments: Any) -> TokenBlocks:
    settings = {"held_out_fraction": 0.0, "part_held_out": False, **arguments}
    return TokenBlocks(corpus, Encoder(Letters()), context_length, **settings)


def letters(n: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(n)]


def documents_in_a_pass(corpus: Any, **arguments: Any) -> list[str]:
    """The one-letter documents that blocks give before the second pass over the text."""
    blocks = blocks_of(corpus, 1, **arguments)
    tokens: list[int] = []
    while True:
        token = blocks.read(1).item()
        if blocks.epoch > 0:
            return [chr(t) for t in tokens if t > 0]
        tokens.append(int(token))


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
