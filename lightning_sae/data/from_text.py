"""What `ActivationDataModule` reads: a language model at its hooks, and text in blocks."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.encoding import DocumentStart, Encoder
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.load_model import LoadedModel, load_language_model
from lightning_sae.data.loaders import Rows
from lightning_sae.data.notices import say_short, say_unknown, unknown_token
from lightning_sae.data.several_hooks import SeveralHooks, load_at_hooks
from lightning_sae.data.source import ActivationSource
from lightning_sae.data.stream import ActivationFilter
from lightning_sae.data.text import Corpus, Text, described, open_text
from lightning_sae.data.tokens import TokenBlocks
from lightning_sae.distributed.split import copies_of

OPEN = ("language_model", "filter", "corpus", "held_out_corpus")
"""Attributes that are created lazily and hold models, files or counts."""


class ReadFromText(ActivationSource, ABC):
    """Base class of `ActivationDataModule`: which model, hooks and tokens its activations are of.

    Its attributes are the arguments of that class.
    """

    hook_name: str | Sequence[str]
    hook_names: list[str]
    model: str | Path | LoadedModel
    model_dtype: str
    model_kwargs: dict[str, Any] | None
    tokenizer: Any
    head: int | None
    text: Text
    validation_text: Text | None
    text_column: str
    text_split: str
    streaming: bool
    validation_fraction: float
    document_start: DocumentStart
    separator: str
    pack: bool
    keep_rest: bool
    chat_roles: list[str] | None
    context_length: int
    blocks_per_pass: int
    drop_special_tokens: bool
    positions: tuple[int, int] | None
    max_norm_multiple: float | None
    seed: int
    _passes: dict[Any, Iterator[Tensor]]
    _said: set[str]

    @abstractmethod
    def train_dataloader(self) -> Iterable[Rows]:
        """Batches of activations."""

    # The model at its hooks.

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model, loaded when first needed."""
        model = self._load()
        longest = model.context_length
        if longest is not None and self.context_length > longest:
            raise ValueError(
                f"Expected argument `context_length` to be at most {longest}, the context of the "
                f"model, but got {self.context_length}: make it shorter."
            )
        return model

    def _load(self) -> LanguageModel:
        dtype = None if self.model_dtype == "auto" else getattr(torch, self.model_dtype)
        how = {"tokenizer": self.tokenizer, "model_kwargs": self.model_kwargs, "head": self.head}
        if isinstance(self.hook_name, str):
            return load_language_model(self.model, self.hook_name, dtype, **how)
        return load_at_hooks(self.model, self.hook_names, dtype, **how)

    @cached_property
    def d_in(self) -> Any:
        """Width of the activations, measured on one token; by hook if there are several."""
        model = self.language_model
        return model.widths if isinstance(model, SeveralHooks) else model.width()

    def by_hook(self, rows: Float[Tensor, "rows d"]) -> Rows:
        """Rows in the form of a batch: a dictionary by hook if there are several."""
        model = self.language_model
        return model.split(rows) if isinstance(model, SeveralHooks) else rows

    # The text.

    @cached_property
    def filter(self) -> ActivationFilter:
        """Which activations are trained and evaluated on."""
        special = self.special_tokens if self.drop_special_tokens else []
        widths = None if isinstance(self.d_in, int) else list(self.d_in.values())
        return ActivationFilter(special, self.positions, self.max_norm_multiple, widths)

    @property
    def special_tokens(self) -> list[int]:
        """Ids of BOS and other special tokens; empty without a tokenizer."""
        tokenizer = self.language_model.tokenizer
        return [] if tokenizer is None else tokenizer.all_special_ids

    @cached_property
    def encoder(self) -> Encoder:
        """Turns documents into token ids."""
        return Encoder(
            self.language_model.tokenizer,
            self.document_start,
            self.separator,
            self.chat_roles,
            self.language_model.vocabulary,
        )

    @property
    @override
    def source(self) -> dict[str, Any]:
        """Where the activations come from, as plain values that are saved with an SAE."""
        name = {"model": "embedded"} if self.model == EMBEDDED_MODEL else {}
        return {
            **self.language_model.identity,
            **name,
            "hook_name": self.hook_names if len(self.hook_names) > 1 else self.hook_names[0],
            "head": self.head,
            "context_length": self.context_length,
            "drop_special_tokens": self.drop_special_tokens,
            "positions": None if self.positions is None else list(self.positions),
            "max_norm_multiple": self.max_norm_multiple,
            "text": described(self.text),
            "text_column": self.text_column,
            **self.encoder.described(),
            "pack": self.pack,
            "keep_rest": self.keep_rest,
            "chat_roles": self.chat_roles,
        }

    @cached_property
    def corpus(self) -> Corpus:
        """The training text; also the held-out text unless `validation_text` is given."""
        return self._open(self.text)

    @cached_property
    def held_out_corpus(self) -> Corpus:
        """The text whose held-out documents are used for validation and test."""
        return self.corpus if self.validation_text is None else self._open(self.validation_text)

    def _open(self, text: Text) -> Corpus:
        return open_text(text, self.text_column, self.text_split, self.streaming, self.seed)

    def training_blocks(self, place: tuple[int, int] | None = None) -> TokenBlocks:
        """Blocks of a share of the training documents, from the start.

        Args:
            place: Index of the share and number of shares; by default those of this rank.
        """
        return self._blocks(self.corpus, self.validation_fraction, False, place)

    def held_out_blocks(self, place: tuple[int, int] | None = None) -> TokenBlocks:
        """Blocks of a share of the held-out documents, from the start; see `training_blocks`."""
        fraction = self.validation_fraction if self.validation_text is None else 1.0
        return self._blocks(self.held_out_corpus, fraction, True, place)

    def _blocks(
        self, corpus: Corpus, fraction: float, held_out: bool, place: tuple[int, int] | None
    ) -> TokenBlocks:
        rank, world_size = place or self._place()
        return TokenBlocks(
            corpus,
            self.encoder,
            self.context_length,
            pack=self.pack,
            keep_rest=self.keep_rest,
            held_out_fraction=fraction,
            part_held_out=held_out,
            rank=rank,
            world_size=world_size,
        )

    def held_out_tokens(
        self, n: int, *, equal_passes: bool = False
    ) -> Iterator[Int[Tensor, "blocks context_length"]]:
        """This rank's held-out blocks, one forward pass at a time.

        Args:
            n: Approximate number of tokens to read; a warning is logged if there are fewer.
            equal_passes: Whether all ranks need the same number of passes. With several ranks, a
                text that is too short is then read again.
        """
        again = equal_passes and self.n_ranks > 1
        per_pass = self.blocks_per_pass * self.context_length
        n_passes = max(1, round(n / per_pass))
        key = (again, *self._place())
        if key not in self._passes:
            self._passes[key] = tee(self._read_held_out(again), 1)[0]
        found = unknown = 0
        unknown_id = unknown_token(self.language_model.tokenizer)
        # The copy first yields the passes that `tee` kept from earlier reads, then continues.
        for tokens in islice(copy.copy(self._passes[key]), n_passes):
            found += tokens.numel()
            unknown += 0 if unknown_id is None else int((tokens == unknown_id).sum())
            yield tokens
        self._say_of_held_out(min(n, n_passes * per_pass), n, found, unknown)

    def _say_of_held_out(self, least: int, n: int, found: int, unknown: int) -> None:
        """Warn once of fewer than `least` of `n` tokens, and once of unknown tokens."""
        if found < least and "short" not in self._said:
            say_short(n, found, self.n_ranks)
            self._said.add("short")
        if unknown and "unknown" not in self._said:
            say_unknown(unknown, found, "held-out")
            self._said.add("unknown")

    def _read_held_out(self, again: bool) -> Iterator[Int[Tensor, "blocks context_length"]]:
        blocks = self.held_out_blocks()
        read = blocks.read if again else blocks.read_first_epoch
        while len(tokens := read(self.blocks_per_pass)):
            yield tokens

    def _require_text(self, blocks: TokenBlocks) -> None:
        blocks.require_ids()
        blocks.read(1)
        if blocks.epoch > 0:
            part = "held-out" if blocks.part_held_out else "training"
            raise ValueError(
                f"Expected argument `text` to hold at least {self.context_length} {part} tokens "
                f"(`context_length`) but a whole pass over it gives fewer: give more text."
            )

    # The ranks that share it.

    @property
    def n_ranks(self) -> int:
        """Processes that share the text."""
        return self._place()[1]

    def _place(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks; those of a split dictionary are one."""
        if self.trainer is None:
            return 0, 1
        return copies_of(self.trainer)[:2]

    def of_all_ranks(self, value: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
        """The mean or the sum of a tensor on the CPU over all ranks; on one, the tensor itself."""
        if self.n_ranks == 1:
            return value
        strategy = self.trainer.strategy  # type: ignore[union-attr]
        own, group = value.to(strategy.root_device, copy=True), copies_of(self.trainer).group  # type: ignore[arg-type]
        found = strategy.reduce(own, group, reduce_op=operation)
        return found.cpu()

    @override
    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or another process: all but the trainer, the model and open text."""
        return {name: value for name, value in super().__getstate__().items() if name not in OPEN}
