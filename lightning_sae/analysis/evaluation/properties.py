"""Properties of tokens and of contexts that can be read off a text.

A label is 1 where the property holds, 0 where it does not and -1 where it is undefined.
"""

import ast
import string
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_sae.analysis.evaluation.passages import Passage
from lightning_sae.analysis.evaluation.python_source import python_masks

Question = Callable[[Passage], Any]
"""A property: a function of a passage, with a value for each token or for the whole passage.

Values are True, False, or None where the property is undefined.
"""
FEWEST = 20
"""Examples of each class that each half of the text needs."""
PYTHON = ("keyword", "identifier", "in_string", "in_comment", "indentation")
"""Properties of Python source."""
PER_TYPE = 8
"""Maximum occurrences of a token that count for its first letter, in each half of the text."""


class Labels(NamedTuple):
    """Labels of all tokens of all passages, concatenated, and of the passages.

    Attributes:
        of_tokens: Labels of the tokens, by property.
        of_passages: Labels of the passages, by property.
    """

    of_tokens: dict[str, Int[Tensor, " tokens"]]
    of_passages: dict[str, Int[Tensor, " passages"]]


def labels_of(passages: Sequence[Passage], own: Mapping[str, Question] | None = None) -> Labels:
    """Labels by the built-in properties and by those of the user.

    Args:
        passages: The text.
        own: User-defined properties, by name.

    Raises:
        ValueError: If a user-defined property returns anything but labels.
    """
    per_passage = [{**word_labels(p.pieces), **python_labels(p)} for p in passages]
    names = dict.fromkeys(name for labels in per_passage for name in labels)
    of_tokens = {
        name: torch.cat(
            [
                labels.get(name, torch.full((len(p.tokens),), -1, dtype=torch.int8))
                for p, labels in zip(passages, per_passage, strict=True)
            ]
        )
        for name in names
    }
    of_passages = {
        **_one_of_several("kind", [p.kind for p in passages]),
        **_one_of_several("label", [p.label for p in passages]),
    }
    for name, question in (own or {}).items():
        _require_new(name, {*word_labels([]), *PYTHON, *of_tokens, *of_passages})
        answers = [_asked(question, name, passage) for passage in passages]
        if all(_is_label(answer) for answer in answers):
            of_passages[name] = _as_labels(answers)
        else:
            for passage, answer in zip(passages, answers, strict=True):
                _require_labels(name, answer, passage)
            of_tokens[name] = torch.cat([_as_labels(answer) for answer in answers])
    return Labels(of_tokens, of_passages)


def word_labels(pieces: Sequence[str]) -> dict[str, Int[Tensor, " tokens"]]:
    """First letter and capital of tokens that are words of ASCII letters; numbers of all tokens.

    Example:
        >>> labels = word_labels(["The", " end", " 12", "."])
        >>> labels["first_letter=e"].tolist(), labels["capital"].tolist()
        ([0, 1, -1, -1], [1, 0, -1, -1])
        >>> labels["number"].tolist()
        [0, 0, 1, 0]
    """
    words = [piece.strip() for piece in pieces]
    first = np.array([w[0] if w.isascii() and w.isalpha() else "" for w in words], dtype="U1")
    lower = np.char.lower(first)
    found = {f"first_letter={c}": _masked(lower == c, first != "") for c in string.ascii_lowercase}
    found["capital"] = _masked(np.char.isupper(first), first != "")
    numbers = np.array([word.isdecimal() for word in words], dtype=bool)
    found["number"] = _masked(numbers, np.array([w != "" for w in words], dtype=bool))
    return found


def python_labels(passage: Passage) -> dict[str, Int[Tensor, " tokens"]]:
    """Labels in Python source: keyword, identifier, indentation, inside a string or a comment.

    A token is labelled by its first character that is not white space. Empty if Python cannot parse
    the text.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about invalid escapes
            ast.parse(passage.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    if not passage.text.strip():
        return {}
    ends = passage.ends()
    masks = python_masks(passage.text, ends[-1])
    at = np.array([_first_character(p, e) for p, e in zip(passage.pieces, ends, strict=True)])
    last = np.array(ends) - 1
    asked = np.array([piece != "" for piece in passage.pieces])
    blank = np.array([piece.strip() == "" for piece in passage.pieces])
    found = {name: _masked(mask[at] & ~blank, asked) for name, mask in masks.code.items()}
    found |= {name: _masked(mask[at], asked) for name, mask in masks.inside.items()}
    found["indentation"] = _masked(masks.indentation[last] & blank, asked)
    return found


def usable(
    labels: Int[Tensor, " n"], tested: Bool[Tensor, " n"], fewest: int = FEWEST
) -> tuple[bool, dict[str, int]]:
    """Whether both halves of the text have enough of both classes, and how many they have."""
    counts = {
        f"{half}_{name}": int((labels[mask] == value).sum())
        for half, mask in (("train", ~tested), ("test", tested))
        for name, value in (("with", 1), ("without", 0))
    }
    return min(counts.values()) >= fewest, counts


def _one_of_several(name: str, values: Sequence[str | None]) -> dict[str, Int[Tensor, " passages"]]:
    """A property for each value that occurs at least four times and not everywhere."""
    counts = {v: values.count(v) for v in dict.fromkeys(values) if v is not None}
    return {
        f"{name}={value}": torch.tensor([v == value for v in values], dtype=torch.int8)
        for value, count in counts.items()
        if 4 <= count < len(values)
    }


def _require_new(name: str, taken: set[str]) -> None:
    if name in taken:
        raise ValueError(
            f"Expected argument `properties` to have names of their own but got `{name}`, which is "
            "a property of this package: rename the function."
        )


def _asked(question: Question, name: str, passage: Passage) -> Any:
    try:
        answer = question(passage)
        # An array, or a tensor of another library, is as good as a list.
        return answer.tolist() if hasattr(answer, "tolist") else answer
    except Exception as error:
        raise ValueError(
            f"Property `{name}` could not be asked of a passage of {len(passage.pieces)} tokens "
            f"({passage.name}): it raised {error!r}."
        ) from error


def _first_character(piece: str, end: int) -> int:
    white = len(piece) - len(piece.lstrip())
    return max(end - len(piece) + (white if white < len(piece) else 0), 0)


def _masked(holds: Any, asked: Any) -> Int[Tensor, " tokens"]:
    return torch.from_numpy(np.where(asked, holds, -1).astype(np.int8))


def _is_label(value: Any) -> bool:
    return value is None or isinstance(value, bool | np.bool_)


def _as_labels(values: Iterable[Any]) -> Int[Tensor, " n"]:
    return torch.tensor([-1 if v is None else int(v) for v in values], dtype=torch.int8)


def _require_labels(name: str, answer: Any, passage: Passage) -> None:
    listed = not isinstance(answer, str | Mapping) and hasattr(answer, "__len__")
    if listed and len(answer) == len(passage.pieces) and all(map(_is_label, answer)):
        return
    wrong = next((a for a in answer if not _is_label(a)), None) if listed else None
    if wrong is not None:
        came = f"{wrong!r:.80} among others"
    elif listed:
        came = f"{len(answer)} of them"
    else:
        came = f"{answer!r:.80}"
    raise ValueError(
        f"Expected property `{name}` to give True, False or None for each of the "
        f"{len(passage.pieces)} tokens of a passage ({passage.name}), or for the passage as a "
        f"whole in all passages, but got {came}: return a list as long as `passage.pieces`."
    )
