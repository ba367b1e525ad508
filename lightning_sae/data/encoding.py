"""Documents (texts, token ids or chats) as token ids, with the tokens before and between them.

A token that is only context (padding, and in a chat the tokens of other roles) is neither trained
nor counted on. It is stored as `~id`, which is negative; `ids_of` gives the ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_sae.checks import require_one_of
from lightning_sae.data.documents import Document
from lightning_sae.data.local_files import FileSpan
from lightning_sae.data.long_text import encode, encode_together, n_windows, text_pieces

DocumentStart = Literal["auto", "bos", "eos", "none"]
PADDING = ~0
PIECE = 2**14
"""Token ids of a document that are yielded at a time."""


class Unreadable(Exception):
    """A row that gives no tokens; the message says why."""


class Marks(NamedTuple):
    """Token ids put before a document and between two documents in a block."""

    start: list[int]
    separator: list[int]


def ids_of(tokens: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The model's token ids for tokens of which some are only context, stored as `~id`."""
    return torch.where(tokens < 0, ~tokens, tokens)


class Encoder:
    """Turns documents into token ids.

    Args:
        tokenizer: A `transformers` tokenizer; may be None for rows of token ids.
        document_start: Token put before a document: see `ActivationDataModule`.
        separator: Token or text put between documents in a block: see `ActivationDataModule`.
        chat_roles: For chats, the roles whose tokens are trained on; None for all.
        vocabulary: Size of the model's vocabulary; None skips the check of ids.

    Raises:
        ValueError: If the tokenizer has no such token.
    """

    def __init__(
        self,
        tokenizer: Any,
        document_start: DocumentStart = "auto",
        separator: str = "auto",
        chat_roles: Sequence[str] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        require_one_of(get_args(DocumentStart), document_start=document_start)
        self.tokenizer = tokenizer
        self.document_start, self.separator = document_start, separator
        self.chat_roles, self.vocabulary = chat_roles, vocabulary
        start = [] if document_start == "auto" else self._mark("document_start", document_start)
        between = [] if separator == "auto" else self._mark("separator", separator)
        self._given = Marks(start, between)

    @cached_property
    def _chosen(self) -> tuple[str, str]:
        """`document_start` and `separator` for texts, with `auto` resolved by the tokenizer."""
        start, separator, tokenizer = self.document_start, self.separator, self.tokenizer
        if start == "auto":
            start = "bos" if tokenizer is not None and _begins_with_bos(tokenizer) else "none"
        if separator == "auto":
            has_eos = tokenizer is not None and tokenizer.eos_token_id is not None
            separator = "eos" if start == "none" and has_eos else "none"
        return start, separator

    def described(self) -> dict[str, str]:
        """The tokens before and between texts, as plain values."""
        start, separator = self._chosen
        auto = {
            "document_start": f"auto ({start} before texts)",
            "separator": f"auto ({separator} between texts)",
        }
        given = {"document_start": self.document_start, "separator": self.separator}
        return {name: auto[name] if value == "auto" else value for name, value in given.items()}

    @cached_property
    def _of_texts(self) -> Marks:
        start, separator = self._chosen
        if self.separator == "auto" and start == separator == "none":
            raise ValueError(
                "Expected the model's tokenizer to have a BOS or EOS token to keep documents apart "
                "but it has neither: set `separator` to a text, such as a blank line, or to `none`."
            )
        return Marks(self._mark("document_start", start), self._mark("separator", separator))

    def marks(self, document: Document) -> Marks:
        """Token ids put before a document; `auto` adds nothing to token ids and chats."""
        return self._of_texts if _is_text(document.text) else self._given

    def pieces(self, document: Document, start: int = 0) -> Iterator[list[int]]:
        """Tokens of a document, without marks, in pieces, from piece `start` on.

        Raises:
            Unreadable: If the row gives no tokens.
            ValueError: If this tokenizer or model can read no such document.
        """
        content, where = document.text, document.where
        if content is None:
            raise Unreadable(f"{where} has no text")
        if _is_text(content):
            self._require_tokenizer()
            if isinstance(content, str) and not document.may_be_empty:
                _require_encodable(content, where)
            if document.tokens is not None:
                return iter([document.tokens][start:])
            return text_pieces(self.tokenizer, content, start)
        if isinstance(content, Mapping):  # what `datasets` made of a list of messages
            content = _rows_of(content)
        if not isinstance(content, list):
            raise Unreadable(f"{where} holds {type(content).__name__}, which is not text")
        if not content:
            raise Unreadable(f"{where} is empty")
        if all(isinstance(item, Mapping) for item in content):
            ids = self._chat(content, where)
        elif all(type(item) is int for item in content):
            ids = self._checked(content, where)
        else:
            raise Unreadable(f"{where} holds a list that is neither token ids nor a chat")
        return (ids[i : i + PIECE] for i in range(start * PIECE, len(ids), PIECE))

    def with_tokens(self, documents: list[Document]) -> list[Document]:
        """Tokenise the short texts among documents in one call, if the tokenizer is a fast one.

        Returns:
            The documents in their order, with `tokens` where they were made.
        """
        short = [i for i, document in enumerate(documents) if _is_short(document.text)]
        if len(short) < 2 or not getattr(self.tokenizer, "is_fast", False):
            return documents
        try:
            found = encode_together(self.tokenizer, [documents[i].text for i in short])
        except Exception:  # `pieces` says in its turn which of them cannot be read
            return documents
        made = dict(zip(short, found, strict=True))
        return [d._replace(tokens=made.get(i)) for i, d in enumerate(documents)]

    def require_ids(self, document: Document) -> None:
        """Raise a ValueError if a list of token ids is out of range; accept any other content."""
        if isinstance(document.text, list) and document.text and type(document.text[0]) is int:
            self._checked(document.text, document.where)

    def _require_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError(
                "Expected argument `model` to come with a tokenizer, for `text` holds text, but it "
                "has none: set `tokenizer`, save one in the model's folder, or give rows of token "
                "ids."
            )

    def _mark(self, argument: str, word: str) -> list[int]:
        """Token ids of `bos`, `eos`, `none` or a text."""
        if word == "none":
            return []
        self._require_tokenizer()
        if word not in ("bos", "eos"):
            return encode(self.tokenizer, word)
        token = self.tokenizer.bos_token_id if word == "bos" else self.tokenizer.eos_token_id
        if token is None:
            raise ValueError(
                f"Expected argument `{argument}` to be a token of the tokenizer but got {word!r}, "
                "which it does not have: choose another, or `none`."
            )
        return [token]

    def _checked(self, ids: list[int], where: str) -> list[int]:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        if wrong < 0 or (self.vocabulary is not None and wrong >= self.vocabulary):
            raise ValueError(
                f"Expected argument `text` to hold token ids from 0 to "
                f"{'the vocabulary' if self.vocabulary is None else self.vocabulary - 1} but "
                f"{where} holds {wrong}: use the tokenizer of the model."
            )
        return ids

    def _chat(self, messages: list[Any], where: str) -> list[int]:
        self._require_tokenizer()
        if not self.tokenizer.chat_template:
            raise ValueError(
                "Expected the model's tokenizer to have a chat template, for `text` holds chats, "
                "but it has none: set `tokenizer.chat_template` and save it in the model's folder."
            )
        # `datasets` gives each message the keys of all messages.
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        text = self._rendered(messages, where)
        if self.chat_roles is None:
            return encode(self.tokenizer, text)
        roles = {message.get("role") for message in messages}
        if roles.isdisjoint(self.chat_roles):
            raise Unreadable(
                f"{where} has no message of `chat_roles`={self.chat_roles} but of "
                f"{sorted(map(str, roles))}"
            )
        return self._of_roles(text, self._ends(messages, text, where))

    def _rendered(self, messages: list[Any], where: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise any error
            raise Unreadable(
                f"{where} is not a chat that the tokenizer's template can format ({error})"
            ) from error

    def _ends(self, messages: list[Any], text: str, where: str) -> list[tuple[int, str]]:
        """Position in the chat's text where each message ends, and its role."""
        ends = []
        for n, message in enumerate(messages, 1):
            try:
                head = self._rendered(messages[:n], where)
            except Unreadable:
                continue  # such as a lone system message: it is counted with the next one
            if not text.startswith(head):
                raise ValueError(
                    "Expected argument `chat_roles` to be null for this tokenizer, whose template "
                    f"formats earlier messages differently when others follow ({where}), but got "
                    f"{self.chat_roles}: roles cannot be told apart."
                )
            ends.append((len(head), message.get("role", "")))
        return ends

    def _of_roles(self, text: str, ends: list[tuple[int, str]]) -> list[int]:
        """Tokens of a chat; tokens of other roles are marked as context."""
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        tokens, message = [], 0
        for token, (start, _) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            while message < len(ends) - 1 and start >= ends[message][0]:
                message += 1
            kept = ends[message][1] in (self.chat_roles or ())
            tokens.append(token if kept else ~token)
        return tokens


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether texts begin with BOS in this tokenizer's models.

    They do if the tokenizer adds it itself, or if one token is both BOS and EOS, such as
    `<|endoftext|>`, which then separates documents.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    return bos == tokenizer.eos_token_id or tokenizer("a")["input_ids"][:1] == [bos]


def _require_encodable(text: str, where: str) -> None:
    if not text.strip():
        raise Unreadable(f"{where} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unreadable(f"{where} has half of a character ({error})") from error


def _is_text(content: Any) -> bool:
    return isinstance(content, str | FileSpan)


def _is_short(content: Any) -> bool:
    return isinstance(content, str) and n_windows(content) == 1


def _rows_of(columns: Mapping[str, Any]) -> Any:
    """A dictionary of lists as a list of dictionaries, if it is one."""
    if not all(isinstance(values, list) for values in columns.values()):
        return columns
    values = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]
