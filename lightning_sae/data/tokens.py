"""Endless blocks of tokens cut from documents, with a position that can be saved."""

import logging
from collections.abc import Iterator
from itertools import compress, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_sae.data.documents import Document, held_out
from lightning_sae.data.encoding import PADDING, Encoder, Unreadable
from lightning_sae.data.text import Corpus

log = logging.getLogger("lightning.pytorch")

AHEAD = 16
"""Largest number of documents that are tokenised in one call."""

PATIENCE = 10_000
"""Consecutive rows without tokens after which the text is refused."""


class TokenBlocks:
    """Cuts documents into blocks of `context_length` tokens.

    The text is read over and over; `epoch` counts the passes. The split of a document depends only
    on its name, so no document is in both. Tokens that only serve as context are negative: see
    `encoding`.

    Args:
        corpus: The documents.
        encoder: Returns their tokens, and the marks put before and between them.
        context_length: Tokens in a block.
        pack: Whether a block may hold several documents; otherwise it is padded.
        keep_rest: Whether a document continues in the next block; otherwise tokens that do not fit
            into the block are dropped.
        held_out_fraction: Share of the documents that are held out; 0 keeps all in training.
        part_held_out: Whether these are the blocks of the held-out documents.
        rank: This process among `world_size`: it reads every `world_size`-th document.
        world_size: Number of processes that share the text.

    Attributes:
        skipped: Rows of this split and rank that gave no tokens.
        left_at_end: Tokens of the last complete pass that were still unread when it ended.

    Raises:
        ValueError: From `read`, if a whole pass over the text gives no block, or token ids do not
            belong to the model.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        context_length: int,
        *,
        pack: bool = True,
        keep_rest: bool = True,
        held_out_fraction: float,
        part_held_out: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.context_length = context_length
        self.pack, self.keep_rest = pack, keep_rest
        self.held_out_fraction = held_out_fraction
        self.part_held_out = part_held_out
        self.rank, self.world_size = rank, world_size
        self.epoch = self.document = self.piece = self.skipped = self.left_at_end = 0
        self._rest: list[int] = []
        self._pieces: Iterator[list[int]] | None = None  # of the open document
        self._found = False  # in no pass so far
        self._open()

    def read(self, n: int) -> Int[Tensor, "n context_length"]:
        """The next `n` blocks."""
        need = n * self.context_length
        while len(self._rest) < need:
            self._read_piece()
        block, self._rest = self._rest[:need], self._rest[need:]
        return torch.tensor(block).view(n, self.context_length)

    def require_ids(self, n: int = 1_000_000) -> None:
        """Raise a ValueError if token ids in about the first `n` rows are out of range."""
        for document in self.corpus.epoch(0):
            if not isinstance(document.text, list) or n < 0:
                return
            self.encoder.require_ids(document)
            n -= len(document.text) + 1

    def read_first_epoch(self, n: int) -> Int[Tensor, "blocks context_length"]:
        """The next blocks of the first pass over the text: `n`, or fewer where it ends."""
        found: list[Tensor] = []
        while len(found) < n:
            block = self.read(1)
            if self.epoch > 0:
                break
            found.append(block)
        return torch.cat(found) if found else torch.zeros(0, self.context_length, dtype=torch.long)

    def _read_piece(self) -> None:
        """Add the next tokens of this split and rank to the open block."""
        if self._pieces is None:
            self._next_document()
            return
        tokens = next(self._pieces, None)
        if tokens is None:
            self._end_document()
            return
        self.piece += 1
        start, separator = self.encoder.marks(self._present)
        if self._is_new and (tokens not in ([], start) or self._present.may_be_empty):
            tokens = self._begun(tokens, start, separator)
        if not self._is_new:
            self._add(tokens)

    def _begun(self, tokens: list[int], start: list[int], separator: list[int]) -> list[int]:
        """Add the separator, then return the document's tokens with its start mark.

        A mark is never repeated.
        """
        self._is_new, self._found, self._skipped_in_a_row = False, True, 0
        if self._room() < self.context_length and separator not in (start, self._end(separator)):
            self._rest.extend(separator if self.keep_rest else separator[: self._room()])
        ids = [max(token, ~token) for token in tokens[: len(start)]]
        beside = self._end(start) == start and not self._present.may_be_empty
        return tokens if beside or ids == start else start + tokens

    def _room(self) -> int:
        """Number of tokens that fit into the open block; a whole block if none is open."""
        return self.context_length - len(self._rest) % self.context_length

    def _end(self, mark: list[int]) -> list[int]:
        """The last tokens of the open block, as many as in the mark."""
        n = self.context_length - self._room()
        return self._rest[-len(mark) :] if 0 < len(mark) <= n else []

    def _add(self, tokens: list[int]) -> None:
        """Add tokens to the blocks; without `keep_rest`, only those that fit the open block."""
        if self.keep_rest or len(tokens) < self._room():
            self._rest.extend(tokens)
        else:
            self._rest.extend(tokens[: self._room()])
            self._pieces, self.piece = None, 0

    def _end_document(self) -> None:
        if self._is_new:
            self._skip(Unreadable(f"{self._present.where} gives no tokens"))
        if not self.pack:
            self._rest.extend([PADDING] * (-len(self._rest) % self.context_length))
        self._pieces, self.piece = None, 0

    def _next_document(self) -> None:
        """Open the next document of this split and rank."""
        document, is_mine = next(self._documents, (None, False))
        if document is None:
            self._next_epoch()
            return
        self.document += 1
        if is_mine:
            self._begin(document)

    def _begin(self, document: Document) -> None:
        try:
            self._pieces = self.encoder.pieces(document, self.piece)
        except Unreadable as reason:
            self._skip(reason)
        else:
            self._present, self._is_new = document, self.piece == 0

    def _skip(self, reason: Unreadable) -> None:
        self._is_new = False
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._last_skipped = f"; {self.skipped} rows were skipped, the last because {reason}"
        if self.skipped == 1:
            log.warning("%s: it is skipped. Rows that are skipped are counted.", reason)
        if self._skipped_in_a_row == PATIENCE:
            self._refuse()

    def _is_mine(self, document: Document, position: int) -> bool:
        if held_out(document.name, self.held_out_fraction) != self.part_held_out:
            return False
        return position % self.world_size == self.rank

    def _next_epoch(self) -> None:
        if not self._found or self.document == 0:
            self._refuse()
        self.epoch, self.document = self.epoch + 1, 0
        self.left_at_end = len(self._rest)
        self._open()

    def _refuse(self) -> None:
        part = "held-out" if self.part_held_out else "training"
        raise ValueError(
            f"Expected argument `text` to hold {part} documents but its "
            f"{self.document} documents gave none (`validation_fraction` is "
            f"{self.held_out_fraction}{self._last_skipped}): give more text, mark where documents "
            "end with <|endoftext|>, or set `validation_text`."
        )

    def _open(self) -> None:
        """Return to the document being read, or move to the next."""
        self._is_new = False
        self._skipped_in_a_row, self._last_skipped = 0, ""
        self._pieces = None
        begun = self.piece > 0
        self._documents = self._ahead(self.document - begun)
        if begun:
            self._begin(next(self._documents)[0])

    def _ahead(self, position: int) -> Iterator[tuple[Document, bool]]:
        """Documents of this pass from `position` on, each with whether this process reads it.

        Documents to read are tokenised in batches. The first batches are small, so that a run
        starts without delay.
        """
        documents, n = self.corpus.epoch(self.epoch, position), 1
        while batch := [*islice(documents, n)]:
            mine = [self._is_mine(document, i) for i, document in enumerate(batch, position)]
            made = iter(self.encoder.with_tokens([*compress(batch, mine)]))
            for document, is_mine in zip(batch, mine, strict=True):
                yield next(made) if is_mine else document, is_mine
            position, n = position + len(batch), min(2 * n, AHEAD)

    def state_dict(self) -> dict[str, Any]:
        """The position: pass, document, piece of it, and tokens not yet in a block."""
        names = ("epoch", "document", "piece", "skipped")
        rest = torch.tensor(self._rest, dtype=torch.int32)
        return {**{name: getattr(self, name) for name in names}, "rest": rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        self.epoch, self.document = state["epoch"], state["document"]
        self.piece, self.skipped = state.get("piece", 0), state.get("skipped", 0)
        self._rest = state["rest"].tolist()
        self._found = self.epoch > 0 or self.document > 0
        self._open()
