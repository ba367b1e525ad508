import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from lightning_sae.data import long_text
from lightning_sae.data.local_files import FileSpan
from lightning_sae.data.long_text import encode, text_pieces

WINDOW, OVERLAP = 160, 80


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "WINDOW", WINDOW)
    monkeypatch.setattr(long_text, "OVERLAP", OVERLAP)


def some_text(n: int, words: list[str]) -> str:
    rng = random.Random(n)
    return " ".join(rng.choices(words, k=n))


TEXTS = [
    some_text(400, ["the", "cat", "sees", "a", "dog,", "and\nthen", "runs"]),
    some_text(300, ["é", "日本語", "x_1", "\n\n", "🙂", "the"]),
    "the cat " * 20,  # of exactly one window
    "  \n" * 100,
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_tokens_of_one_go(tokenizer: Any, text: str) -> None:
    pieces = list(text_pieces(tokenizer, text))
    assert [*chain(*pieces)] == encode(tokenizer, text)
    assert len(pieces) == max(1, -(-(len(text) - OVERLAP) // WINDOW))


@pytest.mark.parametrize("text", TEXTS[:2])
def test_a_file_in_pieces_gives_the_tokens_of_its_text(
    tokenizer: Any, text: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(f"<{text}>", encoding="utf-8")
    span = FileSpan(tmp_path / "a.txt", 1, 1 + len(text.encode()))
    assert span[:] == text
    pieces = list(text_pieces(tokenizer, span))
    assert [*chain(*pieces)] == encode(tokenizer, text)
    assert len(pieces) > 5


def test_reading_goes_on_at_any_piece(tokenizer: Any) -> None:
    pieces = list(text_pieces(tokenizer, TEXTS[0]))
    assert len(pieces) > 5
    for start in range(len(pieces) + 1):
        assert list(text_pieces(tokenizer, TEXTS[0], start)) == pieces[start:]


def test_without_spaces_nothing_is_lost_at_a_joint(tokenizer: Any) -> None:
    text = "".join(random.Random(0).choices("abcdefgh", k=1000))
    found = tokenizer.decode([*chain(*text_pieces(tokenizer, text))])
    place = 0
    for i in range(0, len(text), 10):  # a joint may repeat a part of one token
        place = found.index(text[i : i + 5], place)
    assert len(text) <= len(found) < 1.05 * len(text)


def test_a_tokenizer_without_offsets_gives_all_tokens_at_once() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
            return {"input_ids": [ord(letter) for letter in text]}

    assert list(text_pieces(Slow(), "ab" * 500)) == [[97, 98] * 500]
    assert list(text_pieces(Slow(), "ab" * 500, 1)) == []
