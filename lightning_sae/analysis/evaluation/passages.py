"""Held-out documents as blocks of tokens, with the text of every token."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_sae.data import ActivationDataModule
from lightning_sae.data.documents import Document, held_out
from lightning_sae.data.encoding import PADDING, Unreadable, ids_of
from lightning_sae.data.local_files import FileSpan

CHARACTERS_PER_TOKEN = 16
"""Characters per token, chosen above the average, to bound the text read of a file."""


class Passage(NamedTuple):
    """The beginning of a document, with the text of each of its tokens.

    Attributes:
        name: Name of the document.
        kind: First folder of its name, or else the file that contains it.
        text: Its text; tokens may cover less.
        tokens: Token ids, including the mark that begins the document. A token that is only
            context, such as those of other roles in a chat, is stored as `~id`.
        pieces: Text of each token with the white space before it; empty for a mark. Joined, they
            are the beginning of `text`.
        label: Value of `label_column`, if one was given.
    """

    name: str
    kind: str
    text: str
    tokens: list[int]
    pieces: list[str]
    label: str | None = None

    def ends(self) -> list[int]:
        """Position in the text where each token ends."""
        return torch.tensor([len(piece) for piece in self.pieces]).cumsum(0).tolist()


def read_passages(
    data: ActivationDataModule, n_tokens: int, per_document: int, label_column: str | None = None
) -> list[Passage]:
    """Beginnings of held-out documents, in the order in which a test reads them.

    Args:
        data: Provides the documents and the tokenizer.
        n_tokens: Approximate total number of tokens; fewer if the text is shorter.
        per_document: Maximum number of tokens per document.
        label_column: A column of the text whose values become labels.

    Raises:
        ValueError: If the held-out text is too short for probing.
    """
    found: list[Passage] = []
    total = 0
    for document, label in _documents(data, label_column):
        try:
            passage = _passage(data, document, per_document, label)
        except Unreadable:
            continue
        found.append(passage)
        total += len(passage.tokens)
        if total >= n_tokens:
            break
    if len(found) < 4 or total < 4 * data.context_length:
        remedy = "give more text, or raise `validation_fraction`"
        if total >= n_tokens:  # the text may have more
            remedy = f"read more than {n_tokens} tokens (`probe_tokens`)"
        raise ValueError(
            "Expected argument `text` to have at least 4 held-out documents and "
            f"{4 * data.context_length} tokens (4 times `context_length`) but {len(found)} and "
            f"{total} were read: {remedy}."
        )
    return found


def _documents(
    data: ActivationDataModule, label_column: str | None
) -> Iterator[tuple[Document, str | None]]:
    fraction = data.validation_fraction if data.validation_text is None else 1.0
    documents = data.held_out_corpus.epoch(0)
    labels: Iterator[Any] = iter(lambda: None, 0)
    if label_column is not None:
        # The seed fixes the order, so these are the same rows in the same order.
        labels = (d.text for d in _labels(data, label_column).epoch(0))
    for document, label in zip(documents, labels, strict=False):
        if label is not None and label == document.text:
            raise ValueError(
                f"Expected argument `label_column` to name another column than the text's but got "
                f"{label_column}, and {document.where or 'the text'} has no other: give text with "
                "columns."
            )
        if held_out(document.name, fraction):
            yield document, None if label is None else str(label)


def _labels(data: ActivationDataModule, column: str) -> Any:
    from lightning_sae.data.text import open_text

    text = data.text if data.validation_text is None else data.validation_text
    try:
        return open_text(text, column, data.text_split, data.streaming, data.seed)
    except ValueError as error:
        raise ValueError(
            f"Expected argument `label_column` to name a column of words beside `text_column` but "
            f"got {column}: {error}"
        ) from error


def _passage(
    data: ActivationDataModule, document: Document, most: int, label: str | None
) -> Passage:
    tokenizer, content = data.language_model.tokenizer, document.text
    start = data.encoder.marks(document).start
    in_training = data.encoder.pieces(document)  # refuses what training cannot read
    if isinstance(content, str | FileSpan) and tokenizer is not None and tokenizer.is_fast:
        text = content if isinstance(content, str) else content[: CHARACTERS_PER_TOKEN * most]
        ids, pieces = _with_offsets(tokenizer, text, most)
    else:
        ids = list(islice(chain.from_iterable(in_training), most))
        known = ids_of(torch.tensor(ids)).tolist()
        pieces = ["" if tokenizer is None else tokenizer.decode([token]) for token in known]
        text = "".join(pieces)
    if ids in ([], start) and not document.may_be_empty:
        raise Unreadable(f"{document.where} gives no tokens")
    if ids[: len(start)] == start:
        start = []  # a mark is never repeated
    return Passage(
        document.name, _kind(document), text, start + ids, [""] * len(start) + pieces, label
    )


def _with_offsets(tokenizer: Any, text: str, most: int) -> tuple[list[int], list[str]]:
    """Tokens of the beginning of a text, and the text of each token."""
    found = tokenizer(
        text[: CHARACTERS_PER_TOKEN * most],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    pieces, at = [], 0
    for _, end in found["offset_mapping"][:most]:
        pieces.append(text[at : max(at, end)])  # a character in several tokens belongs to the first
        at = max(at, end)
    return found["input_ids"][:most], pieces


def _kind(document: Document) -> str:
    if "/" in document.name:
        return PurePosixPath(document.name).parts[0]
    return PurePosixPath(document.where.rsplit(" of ", 1)[-1]).name or "no folder"


def halves(passages: list[Passage]) -> Bool[Tensor, " passages"]:
    """Mask of the passages in the test half: every second of each kind and label."""
    seen: dict[tuple[str, str | None], int] = {}
    tested = []
    for passage in passages:
        group = passage.kind, passage.label
        seen[group] = seen.get(group, 0) + 1
        tested.append(seen[group] % 2 == 0)
    return torch.tensor(tested)


class Blocks(NamedTuple):
    """Passages cut into blocks of one passage each; the last block of a passage is padded.

    Attributes:
        tokens: The tokens.
        passage: Index of each block's passage.
        number: Index of each token among all tokens of the passages; -1 for padding. Padding cannot
            be told from `tokens`, where a token that is only context is negative too.
    """

    tokens: Int[Tensor, "blocks context_length"]
    passage: Int[Tensor, " blocks"]
    number: Int[Tensor, "blocks context_length"]


def blocks_of(passages: list[Passage], context_length: int) -> Blocks:
    """Cut passages into blocks."""
    rows, owners, numbers, before = [], [], [], 0
    for owner, passage in enumerate(passages):
        tokens = torch.tensor(passage.tokens)
        padding = torch.full((-len(tokens) % context_length,), -1)
        number = torch.arange(before, before + len(tokens))
        rows.append(torch.cat([tokens, torch.full_like(padding, PADDING)]).view(-1, context_length))
        numbers.append(torch.cat([number, padding]).view(-1, context_length))
        owners += [owner] * len(rows[-1])
        before += len(tokens)
    return Blocks(torch.cat(rows), torch.tensor(owners), torch.cat(numbers))
