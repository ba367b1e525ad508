"""Documents as blocks of tokens, without end and with a place to go on from."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_sae.data.documents import Document, held_out
from lightning_sae.data.text import Corpus


class TokenBlocks:
    """Packs documents, each after a BOS token, into blocks of `context_length` tokens.

    The text is read over and over; `epoch` counts the passes. Which documents belong to the
    split is decided by their names alone, so no document is in both.

    Args:
        corpus: The documents.
        tokenizer: A `transformers` tokenizer.
        context_length: Tokens in a block.
        held_out_fraction: Share of the documents that are held out; 0 keeps all in training.
        part_held_out: Whether these are the blocks of the held-out documents.
        rank: This process among `world_size`: it reads every `world_size`-th document.
        world_size: Number of processes that share the text.

    Raises:
        ValueError: From `read`, if a whole pass over the text gives no block.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        context_length: int,
        *,
        held_out_fraction: float,
        part_held_out: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.bos = bos_token(tokenizer)
        self.context_length = context_length
        self.held_out_fraction = held_out_fraction
        self.part_held_out = part_held_out
        self.rank, self.world_size = rank, world_size
        self.epoch = self.document = 0
        self._rest: list[int] = []
        self._open()

    def read(self, n: int) -> Int[Tensor, "n context_length"]:
        """The next `n` blocks."""
        need = n * self.context_length
        while len(self._rest) < need:
            self._rest.extend(self._next_document())
        block, self._rest = self._rest[:need], self._rest[need:]
        return torch.tensor(block).view(n, self.context_length)

    def read_first_epoch(self, n: int) -> Int[Tensor, "blocks context_length"]:
        """The next blocks of the first pass over the text: `n`, or fewer where it ends."""
        found: list[Tensor] = []
        while len(found) < n:
            block = self.read(1)
            if self.epoch > 0:
                break
            found.append(block)
        return torch.cat(found) if found else torch.zeros(0, self.context_length, dtype=torch.long)

    def _next_document(self) -> list[int]:
        """Tokens of the next document of this split and rank."""
        while True:
            document = next(self._documents, None)
            if document is None:
                self._next_epoch()
                continue
            self.document += 1
            if self._is_mine(document):
                self._found = True
                return [self.bos, *encode(self.tokenizer, document.text)]

    def _is_mine(self, document: Document) -> bool:
        if held_out(document.name, self.held_out_fraction) != self.part_held_out:
            return False
        return (self.document - 1) % self.world_size == self.rank

    def _next_epoch(self) -> None:
        if not self._found and self._start == 0:
            self._refuse()
        self.epoch, self.document = self.epoch + 1, 0
        self._open()

    def _refuse(self) -> None:
        part = "held-out" if self.part_held_out else "training"
        raise ValueError(
            f"Expected argument `text` to hold {part} documents but a whole pass over its "
            f"{self.document} documents gave none (`validation_fraction` is "
            f"{self.held_out_fraction}): give more text, mark where documents end with "
            "<|endoftext|>, or set `validation_text`."
        )

    def _open(self) -> None:
        self._start = self.document
        self._found = False
        self._documents: Iterator[Document] = self.corpus.epoch(self.epoch, self.document)

    def state_dict(self) -> dict[str, Any]:
        """Where reading stands: the pass, the document, and tokens not yet in a block."""
        rest = torch.tensor(self._rest, dtype=torch.int32)
        return {"epoch": self.epoch, "document": self.document, "rest": rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` stood."""
        self.epoch, self.document = state["epoch"], state["document"]
        self._rest = state["rest"].tolist()
        self._open()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with nothing added; a text may be longer than the model's context."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def bos_token(tokenizer: Any) -> int:
    """The token that begins a document: BOS, or EOS where there is no BOS.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "Expected the model's tokenizer to have a BOS or EOS token to begin documents with but "
        "it has neither: set `tokenizer.bos_token`."
    )
