"""The stream of activations as a LightningDataModule."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.data.buffer import ShuffleBuffer, check_buffer
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.language_model import LanguageModel, load_language_model
from lightning_sae.data.loaders import EndlessBatches, Rows
from lightning_sae.data.scaling import Scaling, estimate_scaling, require_usable
from lightning_sae.data.several_hooks import (
    SeveralHooks,
    checked_names,
    load_at_hooks,
    require_same_hooks,
)
from lightning_sae.data.stream import ActivationFilter, ActivationStream
from lightning_sae.data.text import Corpus, open_text
from lightning_sae.data.tokens import TokenBlocks

Dtype = Literal["float32", "float16", "bfloat16"]
Data = TypeVar("Data", bound="ActivationDataModule")


class HeldOutBatches:
    """Held-out activations in order, in batches of at most the size of training's.

    Each pass of the model gives the same number of batches, however many activations are left
    out, for all ranks must see equally many.

    Args:
        data: The data module.
        n: Activations before filtering, about.
    """

    def __init__(self, data: "ActivationDataModule", n: int) -> None:
        self.data = data
        self.n = n
        per_pass = data.blocks_per_pass * data.context_length
        self._batches_per_pass = math.ceil(per_pass / data.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        model, keep = self.data.language_model, self.data.filter
        for tokens in self.data.held_out_tokens(self.n, equal_passes=True):
            activations = model.activations(tokens)
            kept = keep.kept(tokens, activations).to(activations.device)
            batches = activations[kept].float().tensor_split(self._batches_per_pass)
            yield from map(self.data.by_hook, batches)


class ActivationDataModule(LightningDataModule):
    """Text through a language model to shuffled batches of activations.

    Text is tokenised, packed into blocks of `context_length` tokens with a BOS token before each
    document, and run through the model up to the hook and no further. Activations pass a filter
    and a shuffling buffer. Training is endless: its length is `trainer.max_steps`. Validation and
    test read held-out documents, chosen by a hash of their names or contents, which training
    never sees.

    Args:
        hook_name: TransformerLens name of the hook, such as `blocks.3.hook_resid_post`; or
            several, for `SideBySide`: then one pass of the model reads them all, a batch is a
            tensor by hook, and its rows are of the same tokens at all hooks.
        model: Folder or hub name of the language model, an instance of it, or `embedded` for the
            small model that comes with this package.
        text: `embedded` for the Python standard library's source; files, glob patterns or folders
            (.txt with `<|endoftext|>` between documents, .jsonl, .parquet); a folder that
            `datasets` saved; or a hub name.
        text_column: Name of the text column, where there are columns.
        text_split: Split of a saved or hub data set.
        streaming: Read a hub data set as a stream, without a copy on the disk.
        validation_text: Text of its own for validation and test; by default a share of `text`.
        validation_fraction: Share of the documents of `text` that are held out.
        context_length: Tokens in a block.
        blocks_per_pass: Blocks in one forward pass of the model.
        batch_size: Activations in a batch.
        buffer_size: Activations in the shuffling buffer.
        refill_fraction: Share of the buffer that is served before it is refilled.
        prefetch: Read ahead in a thread while batches are trained on.
        dtype: dtype of the activations in the buffer; batches are float32.
        model_dtype: dtype of the model's weights.
        drop_special_tokens: Leave out the activations of BOS and other special tokens.
        positions: First position kept in a block and the one behind the last; null keeps all.
        max_norm_multiple: Leave out activations longer than this multiple of the median norm of
            their pass; null keeps all.
        center: Have the SAE subtract the mean activation, estimated on the first full buffer.
        scale: Have the SAE scale activations to mean norm sqrt(d_in), estimated likewise.
        n_validation: Held-out activations in a validation, for each rank.
        n_test: Held-out activations in a test, for each rank.
        seed: Seed of the order of the documents and of the shuffle.
        largest_saved_buffer: Bytes up to which the buffer is part of a checkpoint. A larger one
            is filled anew on resume, which is then not exact.

    Raises:
        ValueError: If a size does not fit; most bad input is found in `d_in` and `setup`, before
            any work.
    """

    def __init__(
        self,
        hook_name: str | Sequence[str],
        model: str | Path | nn.Module = "embedded",
        *,
        text: str | Path | Sequence[str | Path] = "embedded",
        text_column: str = "text",
        text_split: str = "train",
        streaming: bool = False,
        validation_text: str | Path | Sequence[str | Path] | None = None,
        validation_fraction: float = 0.1,
        context_length: int = 128,
        blocks_per_pass: int = 32,
        batch_size: int = 2048,
        buffer_size: int = 65536,
        refill_fraction: float = 0.5,
        prefetch: bool = True,
        dtype: Dtype = "float32",
        model_dtype: Dtype = "float32",
        drop_special_tokens: bool = True,
        positions: tuple[int, int] | None = None,
        max_norm_multiple: float | None = None,
        center: bool = False,
        scale: bool = False,
        n_validation: int = 32768,
        n_test: int = 131072,
        seed: int = 0,
        largest_saved_buffer: int = 2**30,
    ) -> None:
        super().__init__()
        check_buffer(buffer_size, batch_size, refill_fraction)
        _check_positions(positions, context_length)
        self.hook_name, self.hook_names = hook_name, checked_names(hook_name)
        self.model = EMBEDDED_MODEL if model == "embedded" else model
        self.text = text
        self.text_column, self.text_split, self.streaming = text_column, text_split, streaming
        self.validation_text = validation_text
        self.validation_fraction = 0.0 if validation_text is not None else validation_fraction
        self.context_length, self.blocks_per_pass = context_length, blocks_per_pass
        self.batch_size, self.buffer_size = batch_size, buffer_size
        self.refill_fraction, self.prefetch = refill_fraction, prefetch
        self.dtype, self.model_dtype = getattr(torch, dtype), getattr(torch, model_dtype)
        self.drop_special_tokens = drop_special_tokens
        self.positions, self.max_norm_multiple = positions, max_norm_multiple
        self.center, self.scale = center, scale
        self.n_validation, self.n_test = n_validation, n_test
        self.seed = seed
        self.largest_saved_buffer = largest_saved_buffer
        self.buffer: ShuffleBuffer | None = None
        self._scalings: dict[str, Scaling] = {}
        self._restored: dict[str, Any] = {}
        self._left: dict[str, Any] = {}

    # The model at its hooks.

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model, loaded when first needed."""
        if isinstance(self.hook_name, str):
            model = load_language_model(self.model, self.hook_name, self.model_dtype)
        else:
            model = load_at_hooks(self.model, self.hook_names, self.model_dtype)
        longest = model.context_length
        if longest is not None and self.context_length > longest:
            raise ValueError(
                f"Expected argument `context_length` to be at most {longest}, the context of the "
                f"model, but got {self.context_length}: make it shorter."
            )
        return model

    @cached_property
    def d_in(self) -> Any:
        """Width of the activations, seen on one token; a dictionary by hook of several."""
        model = self.language_model
        return model.widths if isinstance(model, SeveralHooks) else model.width()

    def by_hook(self, rows: Float[Tensor, "rows d"]) -> Rows:
        """Rows as a batch has them: by hook if there are several."""
        model = self.language_model
        return model.split(rows) if isinstance(model, SeveralHooks) else rows

    def at(self: Data, hook_name: str) -> Data:
        """The same data, of a run that may be under way, with one of its hooks alone.

        Its language model, width, filter, source and scaling are the hook's.
        """
        if not isinstance(self.language_model, SeveralHooks):
            return self
        one, scalings = copy.copy(self), self.scalings
        one.hook_name, one.hook_names = hook_name, [hook_name]
        one._scalings = {hook_name: scalings[hook_name]} if scalings else {}
        model = self.language_model
        vars(one).update(language_model=model.at_each[hook_name], d_in=model.widths[hook_name])
        vars(one).pop("filter", None)  # that of all hooks
        return one

    @property
    def scaling(self) -> Scaling | None:
        """Centring and scaling estimated on the first full buffer; None if not asked for.

        On several ranks it is estimated on all their buffers, so all have to ask for it. Of several
        hooks each has its own, see `at`.
        """
        return self.scalings.get(self.hook_names[0]) if len(self.hook_names) == 1 else None

    @property
    def scalings(self) -> dict[str, Scaling]:
        """`scaling` of each hook; none if not asked for."""
        if not self._scalings and self.buffer is not None and (self.center or self.scale):
            rows = self.buffer.fill() if self.buffer.rows is None else self.buffer.rows
            mean_of_ranks = partial(self.of_all_ranks, operation="mean")
            self._scalings = {
                name: estimate_scaling(part, self.center, self.scale, mean_of_ranks)
                for name, part in self._parts(rows).items()
            }
        return self._scalings

    def of_all_ranks(self, value: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
        """The mean or the sum of a tensor on the CPU over all ranks; on one, the tensor itself."""
        if self.n_ranks == 1:
            return value
        strategy = self.trainer.strategy  # type: ignore[union-attr]
        found = strategy.reduce(value.to(strategy.root_device, copy=True), reduce_op=operation)
        return found.cpu()

    @property
    def n_ranks(self) -> int:
        """Processes that share the text."""
        return self._place()[1]

    def _place(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    # The text.

    @cached_property
    def filter(self) -> ActivationFilter:
        """Which activations are trained and evaluated on."""
        tokenizer = self.language_model.tokenizer
        special = tokenizer.all_special_ids if self.drop_special_tokens else []
        widths = None if isinstance(self.d_in, int) else list(self.d_in.values())
        return ActivationFilter(special, self.positions, self.max_norm_multiple, widths)

    @property
    def source(self) -> dict[str, Any]:
        """Where the activations come from, as plain values to keep with an SAE."""
        name = "embedded" if self.model == EMBEDDED_MODEL else self.language_model.name
        return {
            "model": name,
            "hook_name": self.hook_names if len(self.hook_names) > 1 else self.hook_names[0],
            "context_length": self.context_length,
            "drop_special_tokens": self.drop_special_tokens,
            "positions": None if self.positions is None else list(self.positions),
            "max_norm_multiple": self.max_norm_multiple,
            "text": str(self.text) if isinstance(self.text, str | Path) else [*map(str, self.text)],
        }

    @cached_property
    def corpus(self) -> Corpus:
        """The text of training, and of what is held out unless that has its own."""
        return self._open(self.text)

    @cached_property
    def held_out_corpus(self) -> Corpus:
        """The text whose held-out documents are validated and tested on."""
        return self.corpus if self.validation_text is None else self._open(self.validation_text)

    def _open(self, text: str | Path | Sequence[str | Path]) -> Corpus:
        return open_text(text, self.text_column, self.text_split, self.streaming, self.seed)

    def training_blocks(self) -> TokenBlocks:
        """Blocks of this rank's share of the training documents, from the start."""
        return self._blocks(self.corpus, self.validation_fraction, held_out=False)

    def held_out_blocks(self) -> TokenBlocks:
        """Blocks of this rank's share of the held-out documents, from the start."""
        fraction = self.validation_fraction if self.validation_text is None else 1.0
        return self._blocks(self.held_out_corpus, fraction, held_out=True)

    def _blocks(self, corpus: Corpus, fraction: float, held_out: bool) -> TokenBlocks:
        rank, world_size = self._place()
        return TokenBlocks(
            corpus,
            self.language_model.tokenizer,
            self.context_length,
            held_out_fraction=fraction,
            part_held_out=held_out,
            rank=rank,
            world_size=world_size,
        )

    def held_out_tokens(
        self, n: int, *, equal_passes: bool = False
    ) -> Iterator[Int[Tensor, "blocks context_length"]]:
        """This rank's held-out blocks, a forward pass at a time.

        Args:
            n: Tokens to read, about; fewer if there are no more.
            equal_passes: Whether all ranks need equally many passes: where there are several, a
                text that is too short is then read again.
        """
        blocks = self.held_out_blocks()
        again = equal_passes and blocks.world_size > 1
        read = blocks.read if again else blocks.read_first_epoch
        passes = max(1, round(n / (self.blocks_per_pass * self.context_length)))
        for _ in range(passes):
            tokens = read(self.blocks_per_pass)
            if len(tokens) == 0:
                return
            yield tokens

    # Lightning.

    def setup(self, stage: str) -> None:
        """Load the model and look at the text, so that bad input is found before any work.

        Raises:
            ValueError: If the run has no end, or the text gives no block.
        """
        trainer: Any = self.trainer
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        ends = trainer.max_steps > 0 or timed or isinstance(trainer.limit_train_batches, int)
        if stage == "fit" and not ends:
            raise ValueError(
                "The stream of activations has no end: set `trainer.max_steps` to the number of "
                f"optimiser steps, each on {self.batch_size} activations."
            )
        each_epoch = isinstance(trainer.val_check_interval, float) and trainer.limit_val_batches
        if stage == "fit" and each_epoch and not isinstance(trainer.limit_train_batches, int):
            warnings.warn(
                "Validation would come at the end of an epoch, but the stream has no end: set "
                "`trainer.val_check_interval` to a number of batches and "
                "`trainer.check_val_every_n_epoch` to null, or `trainer.limit_val_batches` to 0.",
                stacklevel=2,
            )
        self.language_model.to(trainer.strategy.root_device)
        if stage == "fit":
            self._require_text(self.training_blocks())
        if stage != "fit" or trainer.limit_val_batches:
            self._require_text(self.held_out_blocks())

    def _require_text(self, blocks: TokenBlocks) -> None:
        blocks.read(1)
        if blocks.epoch > 0:
            part = "held-out" if blocks.part_held_out else "training"
            raise ValueError(
                f"Expected argument `text` to hold at least {self.context_length} {part} tokens "
                f"(`context_length`) but a whole pass over it gives fewer: give more text."
            )

    def train_dataloader(self) -> EndlessBatches:
        """Shuffled batches, going on where a checkpoint left off."""
        if self.buffer is None:
            self.buffer = self._new_buffer()
            self._restore(self.buffer)
        return EndlessBatches(self.buffer, self.by_hook)

    def _restore(self, buffer: ShuffleBuffer) -> None:
        state, self._restored = {**self._restored}, {}
        require_same_hooks(state.pop("hook_names", self.hook_names), self.hook_names)
        saved_by = state.pop("rank", 0), state.pop("ranks", 1)
        if state and saved_by != self._place():
            state = {"source": state["source"], "generator": buffer.generator.get_state()}
            warnings.warn(
                f"The checkpoint holds no buffer of rank {self._place()[0]}: it is of a run with "
                "another number of ranks, or this rank's file beside it is missing. The buffer is "
                "filled anew with text that follows what rank 0 had read; some may come twice, and "
                "some not at all.",
                stacklevel=2,
            )
        elif state and "rows" not in state:
            warnings.warn(
                "The checkpoint holds no buffer, for it is larger than `largest_saved_buffer`: it "
                "is filled anew with the text that follows, and the run is not bit for bit the one "
                "that would have been.",
                stacklevel=2,
            )
        buffer.load_state_dict(state)

    def _new_buffer(self) -> ShuffleBuffer:
        stream = ActivationStream(
            self.language_model,
            self.training_blocks(),
            self.filter,
            self.blocks_per_pass,
            self.dtype,
        )
        return ShuffleBuffer(
            stream,
            self.buffer_size,
            self.batch_size,
            self.refill_fraction,
            self.seed + stream.blocks.rank,
            self.prefetch,
            self._look_at,
        )

    def _look_at(self, rows: Float[Tensor, "rows d"]) -> None:
        for name, part in self._parts(rows).items():
            require_usable(part, name)

    def _parts(self, rows: Float[Tensor, "rows d"]) -> dict[str, Float[Tensor, "rows d_hook"]]:
        parts = self.by_hook(rows)
        return parts if isinstance(parts, dict) else {self.hook_names[0]: parts}

    def val_dataloader(self) -> HeldOutBatches:
        """Held-out activations in order."""
        return HeldOutBatches(self, self.n_validation)

    def test_dataloader(self) -> HeldOutBatches:
        """Held-out activations in order."""
        return HeldOutBatches(self, self.n_test)

    def predict_dataloader(self) -> HeldOutBatches:
        """Held-out activations in order."""
        return HeldOutBatches(self, self.n_test)

    def teardown(self, stage: str) -> None:
        """Stop reading ahead, and note where training stopped for who saves it only now."""
        if stage == "fit" and self.buffer is not None:
            self._left = self.state_dict()
            self.buffer.close()
            self.buffer = None

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Stop reading ahead, lest the process wait for a fill that nobody needs."""
        if self.buffer is not None:
            self.buffer.close()

    def statistics(self) -> dict[str, float]:
        """What the stream has read and dropped so far; empty before training."""
        source = None if self.buffer is None else self.buffer.source
        return source.statistics() if isinstance(source, ActivationStream) else {}

    def state_dict(self) -> dict[str, Any]:
        """Buffer, stream and generator, for an exact resume."""
        if self.buffer is None:
            return self._restored or self._left
        state = self.buffer.state_dict(with_rows=self.buffer.nbytes() <= self.largest_saved_buffer)
        rank, ranks = self._place()
        own = {"rank": rank, "ranks": ranks, "hook_names": self.hook_names}
        return {**state, **own} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the buffer that `train_dataloader` makes."""
        self._restored = state_dict


def _check_positions(positions: tuple[int, int] | None, context_length: int) -> None:
    """Raise a ValueError if no position of a block is kept."""
    if positions is not None and not 0 <= positions[0] < min(positions[1], context_length):
        raise ValueError(
            f"Expected argument `positions` to be the first position kept and the one behind the "
            f"last, within `context_length`={context_length}, but got {positions}."
        )
