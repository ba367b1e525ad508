"""Tokenise text; a long text in overlapping windows, with the same tokens as in one call.

A fast tokenizer makes the tokens of several texts, or windows, in parallel.

Two neighbouring windows share some text. Where `AGREED` consecutive tokens are equal, the tokens of
the second window replace those of the first. The result equals that of one call for tokenizers that
work word by word, and in practice for all that look only a short way ahead.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from typing_extensions import Protocol, runtime_checkable

WINDOW = 2**16
OVERLAP = 2**11
TOGETHER = 4
"""Windows that are tokenised at a time."""
AGREED = 8
"""Consecutive tokens that must agree where two windows are joined."""


@runtime_checkable
class LongText(Protocol):
    """Text that can be read in pieces; positions are characters, or bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> str:
        """The characters that lie completely within a slice."""


class Window(NamedTuple):
    """A part of a text: its tokens, the tokenizer's output with their offsets, its characters."""

    ids: list[int]
    encoding: Any
    length: int

    def token(self, i: int) -> tuple[int, int, int]:
        """A token with its start and end in the part."""
        return (self.ids[i], *self.encoding.token_to_chars(i))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without special tokens; a text may be longer than the model's context."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_together(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of several texts, the same as `encode` gives for each; made in parallel."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def n_windows(text: LongText) -> int:
    """Number of windows that a text is tokenised in; 1 if it is short."""
    return -(-max(len(text) - OVERLAP, 1) // WINDOW)


def text_pieces(tokenizer: Any, text: LongText, start: int = 0) -> Iterator[list[int]]:
    """Tokens of a text, without special tokens, window by window from window `start` on.

    A slow tokenizer, which has no offsets, gives all tokens at once.
    """
    n = n_windows(text)
    if n == 1 or not tokenizer.is_fast:
        if start == 0:
            yield encode(tokenizer, text[:])
        return
    first = max(start - 1, 0)
    windows = _windows(tokenizer, text, range(first, n))
    begin, window = 0, next(windows)
    for index in range(first, n):
        end, begin_of_next, following = len(window.ids), 0, window
        if index + 1 < n:
            following = next(windows)
            begins = (index + 1) * WINDOW
            end, begin_of_next = _joint(window, following, len(text[begins : begins + OVERLAP]))
        if index >= start:
            yield window.ids[begin:end]
        begin, window = begin_of_next, following


def _windows(tokenizer: Any, text: LongText, indices: range) -> Iterator[Window]:
    """Windows of a text, `TOGETHER` of which are tokenised at a time."""
    for i in range(0, len(indices), TOGETHER):
        begins = [index * WINDOW for index in indices[i : i + TOGETHER]]
        parts = [text[begin : begin + WINDOW + OVERLAP] for begin in begins]
        found = tokenizer(parts, add_special_tokens=False, verbose=False)
        for part, encoding in zip(parts, found.encodings, strict=True):
            yield Window(encoding.ids, encoding, len(part))


def _joint(first: Window, second: Window, shared: int) -> tuple[int, int]:
    """The number of tokens to keep of the first window and to skip in the second.

    Args:
        first: A window.
        second: The next one.
        shared: Characters at the end of the first that are also the beginning of the second.
    """
    shift, middle = first.length - shared, shared // 2
    backwards = (first.token(i) for i in range(len(first.ids) - 1, -1, -1))
    tail = [*takewhile(lambda token: token[1] >= shift, backwards)][::-1]
    left = [(token, start - shift, end - shift) for token, start, end in tail]
    right = [*takewhile(lambda token: token[1] < shared, map(second.token, range(len(second.ids))))]
    before = len(first.ids) - len(left)
    places = {token: j for j, token in enumerate(right)}
    for i in sorted(range(len(left)), key=lambda i: abs(left[i][1] - middle)):
        j = places.get(left[i], -1)
        whole = i == 0 or left[i - 1][2] <= left[i][1]  # no character is cut
        agreed = left[i : i + AGREED]
        if j >= 0 and whole and len(agreed) == AGREED and agreed == right[j : j + AGREED]:
            return before + i, j
    # A long stretch without agreement: cut at a token; the second window may repeat part of it.
    i = next((i for i, (_, start, _) in enumerate(left) if start >= middle), len(left))
    at = left[i][1] if i < len(left) else shared
    return before + i, max((j for j, (_, start, _) in enumerate(right) if start <= at), default=0)
