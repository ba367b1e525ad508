"""Documents, and which of them are held out."""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

BYTE_ORDER_MARK = "\ufeff"


class Document(NamedTuple):
    """One document and the name that decides its split.

    Attributes:
        name: Stable name, the same on every machine; never a position in a list.
        text: The whole text, or a `FileSpan`; a list of token ids; a chat, as a list of messages.
            Any other value gives no tokens.
        where: Its location, for messages.
        may_be_empty: Whether an empty text still counts as a document, which then gives only its
            mark.
        tokens: Token ids of the text, where they have been made ahead.
    """

    name: str
    text: Any
    where: str = ""
    may_be_empty: bool = False
    tokens: list[int] | None = None


@runtime_checkable
class Documents(Protocol):
    """Documents with random access, read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def named(content: Any, where: str = "") -> Document:
    """A document named after its content, so that copies of it always share a split."""
    if isinstance(content, str):
        content = content.removeprefix(BYTE_ORDER_MARK)  # a byte order mark is not part of the text
        key = content.encode(errors="surrogatepass")
    else:
        if isinstance(content, Tensor | np.ndarray):
            content = content.tolist()
        key = json.dumps(content, sort_keys=True, default=repr).encode()
    return Document(hashlib.blake2b(key, digest_size=16).hexdigest(), content, where)


def held_out(name: str, fraction: float) -> bool:
    """Says whether the document called `name` belongs to the held-out split.

    The name is hashed (64-bit BLAKE2b, read as a number in [0, 1)) and compared with `fraction`.
    So the split depends only on the name: it is the same on every machine, in every order
    of the documents, and a document held out at some fraction stays so at any larger one.

    Args:
        name: The document's name.
        fraction: Expected share of held-out documents, in [0, 1].

    Returns:
        True if the document is held out.

    Raises:
        ValueError: If `fraction` is outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"fraction: expected a share of the documents between 0 and 1, got {fraction}; "
            "pass for example 0.1 to hold out one document in ten"
        )
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    # Integers are compared, not floats: 2**64 - 1 divided by 2**64 rounds up to 1.0.
    return int.from_bytes(digest, "big") < int(fraction * 2**64)
