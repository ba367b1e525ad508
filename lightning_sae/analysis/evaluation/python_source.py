"""Which characters of Python source are keywords, identifiers, strings, comments, indentation."""

import io
import keyword
import re
import token
import tokenize
from typing import Any, NamedTuple

import numpy as np

STRINGS = {"STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}
"""Names of the tokens that make up strings; Python 3.12 and later split f-strings into several."""


class Masks(NamedTuple):
    """Boolean arrays over the characters of a text.

    Attributes:
        code: `keyword` and `identifier`.
        inside: `in_string` and `in_comment`.
        indentation: White space at the beginning of a line, outside strings.
    """

    code: dict[str, Any]
    inside: dict[str, Any]
    indentation: Any


def python_masks(text: str, end: int) -> Masks:
    """Masks of the characters of Python source up to `end`; all are false beyond."""
    names = ("keyword", "identifier", "in_string", "in_comment")
    masks = {name: np.zeros(len(text) + 1, dtype=bool) for name in names}
    lines = [0, *(match.end() for match in re.finditer("\n", text))]
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        first = lines[found.start[0] - 1] + found.start[1]
        name = _name_of(found)
        if name is not None:
            # The last line of a text may have no line break.
            masks[name][first : lines[found.end[0] - 1] + found.end[1]] = True
        if first >= end:
            break
    indentation = np.zeros(len(text) + 1, dtype=bool)
    for match in re.finditer(r"^[ \t]+", text[:end], re.MULTILINE):
        indentation[match.start() : match.end()] = True
    return Masks(
        {name: masks[name] for name in names[:2]},
        {name: masks[name] for name in names[2:]},
        indentation & ~masks["in_string"],
    )


def _name_of(found: tokenize.TokenInfo) -> str | None:
    if found.type == token.NAME:
        return "keyword" if keyword.iskeyword(found.string) else "identifier"
    if found.type == tokenize.COMMENT:
        return "in_comment"
    return "in_string" if token.tok_name[found.type] in STRINGS else None
