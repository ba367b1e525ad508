"""Text to tokens, a long text in overlapping windows that give the tokens of one go.

Two neighbouring windows share some text. Where their tokens in it agree for a while, the first
window's tokens end and the second's go on. What is tokenised word by word gives the same tokens as
in one go; so does in practice whatever else looks only a little way ahead.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, runtime_checkable

WINDOW = 2**16
OVERLAP = 2**11
AGREED = 8
"""Tokens in a row that agree where two windows are joined."""


@runtime_checkable
class LongText(Protocol):
    """What can be read in pieces; positions are characters, or bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> str:
        """The characters that lie as a whole within a slice."""


class Window(NamedTuple):
    """A part of a text: its tokens, the tokenizer's answer with their places, its characters."""

    ids: list[int]
    encoding: Any
    length: int

    def token(self, i: int) -> tuple[int, int, int]:
        """A token, where it starts in the part and where it ends."""
        return (self.ids[i], *self.encoding.token_to_chars(i))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with nothing added; a text may be longer than the model's context."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def text_pieces(tokenizer: Any, text: LongText, start: int = 0) -> Iterator[list[int]]:
    """Tokens of a text, with nothing added, window by window from window `start` on.

    A tokenizer without offsets, which is not a fast one, gives all tokens at once.
    """
    n = -(-max(len(text) - OVERLAP, 1) // WINDOW)
    if n == 1 or not tokenizer.is_fast:
        if start == 0:
            yield encode(tokenizer, text[:])
        return
    begin, window = 0, _window(tokenizer, text, max(start - 1, 0))
    for index in range(max(start - 1, 0), n):
        end, begin_of_next, following = len(window.ids), 0, window
        if index + 1 < n:
            following = _window(tokenizer, text, index + 1)
            begins = (index + 1) * WINDOW
            end, begin_of_next = _joint(window, following, len(text[begins : begins + OVERLAP]))
        if index >= start:
            yield window.ids[begin:end]
        begin, window = begin_of_next, following


def _window(tokenizer: Any, text: LongText, index: int) -> Window:
    begins = index * WINDOW
    part = text[begins : begins + WINDOW + OVERLAP]
    found = tokenizer(part, add_special_tokens=False, verbose=False)
    return Window(found["input_ids"], found, len(part))


def _joint(first: Window, second: Window, shared: int) -> tuple[int, int]:
    """Tokens of the first window up to the joint, and those of the second to leave out before it.

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
    # Without spaces for as long as that: at a token, of which the second may repeat a part.
    i = next((i for i, (_, start, _) in enumerate(left) if start >= middle), len(left))
    at = left[i][1] if i < len(left) else shared
    return before + i, max((j for j, (_, start, _) in enumerate(right) if start <= at), default=0)
