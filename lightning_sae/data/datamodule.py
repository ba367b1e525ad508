"""The stream of activations as a LightningDataModule."""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import expect, refuse, require_integers, require_positive
from lightning_sae.data.buffer import ShuffleBuffer, check_buffer
from lightning_sae.data.devices import place_of_buffer, require_device
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.encoding import DocumentStart
from lightning_sae.data.from_text import ReadFromText
from lightning_sae.data.load_model import LoadedModel
from lightning_sae.data.loaders import (
    EndlessBatches,
    Rows,
    as_asked_for,
    begins_anew,
    require_an_end,
)
from lightning_sae.data.notices import (
    activations_asked_for,
    unknown_token,
)
from lightning_sae.data.scaling import Scaling, estimate_scaling, require_usable
from lightning_sae.data.several_hooks import (
    SeveralHooks,
    checked_names,
    require_same_hooks,
)
from lightning_sae.data.stream import ActivationStream, rows_where
from lightning_sae.data.text import Text

Dtype = Literal["float32", "float16", "bfloat16"]
ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]
Data = TypeVar("Data", bound="ActivationDataModule")


class HeldOutBatches:
    """Held-out activations in order, in batches of at most the size of training batches.

    Each pass of the model gives the same number of batches, regardless of how many activations the
    filter leaves out, because all ranks need the same number of batches.

    Args:
        data: The data module.
        n: Approximate number of activations before filtering.
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
            rows = rows_where(keep.kept(tokens, activations), activations)
            batches = rows.float().tensor_split(self._batches_per_pass)
            yield from map(self.data.by_hook, batches)


class ActivationDataModule(ReadFromText):
    """Shuffled batches of a language model's activations on text.

    Text is tokenised, packed into blocks of `context_length` tokens, and run through the model up
    to the hook. Activations go through a filter and a shuffling buffer. Training
    data is endless; `trainer.max_steps` ends it. Validation and test read held-out documents, which
    are chosen by a hash of their names or contents and never used for training.

    Args:
        hook_name: TransformerLens name of the hook, such as `blocks.3.hook_resid_post`, or the path
            of a module, such as `model.layers.3.mlp`, followed by `:in` or `:out`; or a list of
            hooks, for `SideBySide`: one forward pass then reads all of them, and a batch is a
            dictionary of tensors by hook, whose rows belong to the same tokens.
        model: Folder or hub name of the language model or of a PEFT adapter, a model instance, or
            `embedded` for the small model that comes with this package.
        text: `embedded` for the Python standard library's source; files, glob patterns or folders
            (.txt with `<|endoftext|>` between documents, .jsonl, .csv, .parquet, also compressed);
            a folder that `datasets` saved; a hub name; or, from Python, rows: a data set, or any
            iterable of strings, lists of token ids, chats, or dictionaries with these in a column.
        text_column: Name of the column to read, if the text has columns. It holds text, token ids
            (which need no tokenizer), or chats (lists of messages, formatted by the tokenizer's
            chat template).
        text_split: Split of a saved or hub data set.
        streaming: Read a hub data set as a stream, without a copy on the disk.
        validation_text: Separate text for validation and test; by default a share of `text`.
        validation_fraction: Share of the documents of `text` that are held out.
        document_start: Token put before each document: `bos`, `eos`, `none`, or `auto`. `auto` puts
            BOS before a text if the tokenizer does so itself or uses one token as BOS and EOS, and
            otherwise nothing; before token ids and chats it puts nothing. The token is not repeated
            if a document already begins with it.
        separator: Token or text put between two documents in a block: `bos`, `eos`, `none`, any
            other text, or `auto`. `auto` puts EOS between texts that have no `document_start`, and
            otherwise nothing.
        pack: Whether a block may hold parts of several documents. If not, it is padded; padding is
            neither trained nor evaluated on.
        keep_rest: Whether a document continues in the next block. If not, each block begins with a
            new document, and tokens that do not fit are dropped.
        chat_roles: For chats, the roles whose tokens are trained and evaluated on, such as
            `[assistant]`; tokens of other roles only serve as context. null for all.
        context_length: Tokens in a block.
        blocks_per_pass: Blocks in one forward pass of the model.
        batch_size: Activations in a batch.
        buffer_size: Activations in the shuffling buffer.
        refill_fraction: Share of the buffer that is served before it is refilled.
        buffer_device: Where the buffer lies: `cpu`, a GPU such as `cuda`, or `auto`, the GPU that
            trains if the buffer takes at most half of what is free there. Batches are the same.
        prefetch: Read ahead in a thread while batches are trained on.
        dtype: dtype of the activations in the buffer; batches are float32.
        model_dtype: dtype of the model's weights; `auto` is the checkpoint's own.
        model_kwargs: Further arguments of `from_pretrained`: `revision`, `trust_remote_code` (off
            by default), `attn_implementation`, `device_map`, `quantization_config` and so on. A
            model that is quantised or placed by `device_map` is not moved.
        tokenizer: A tokenizer, or its folder or hub name; by default the model's own.
        head: For a hook with heads, such as `blocks.3.attn.hook_z`, the head to read and replace;
            null for all heads, concatenated.
        drop_special_tokens: Leave out the activations of BOS and other special tokens.
        positions: First position kept in a block and the one after the last; null keeps all.
        max_norm_multiple: Leave out activations longer than this multiple of the median norm of
            their pass; null keeps all.
        center: Have the SAE subtract the mean activation, estimated on the first full buffer.
        scale: Have the SAE scale activations to mean norm sqrt(d_in), estimated on the same buffer.
        n_validation: Held-out activations per validation and rank.
        n_test: Held-out activations per test and rank.
        seed: Seed of the document order and of the shuffle.
        largest_saved_buffer: Size in bytes up to which the buffer is saved in checkpoints. A larger
            buffer is refilled on resume, and the resumed run is then not bit for bit the same.

    Raises:
        ValueError: If a size is invalid. Most other bad input is found in `d_in` and `setup`,
            before any work.
    """

    def __init__(
        self,
        hook_name: str | Sequence[str],
        model: str | Path | LoadedModel = "embedded",
        *,
        text: Text = "embedded",
        text_column: str = "text",
        text_split: str = "train",
        streaming: bool = False,
        validation_text: Text | None = None,
        validation_fraction: float = 0.1,
        document_start: DocumentStart = "auto",
        separator: str = "auto",
        pack: bool = True,
        keep_rest: bool = True,
        chat_roles: Sequence[str] | None = None,
        context_length: int = 128,
        blocks_per_pass: int = 32,
        batch_size: int = 2048,
        buffer_size: int = 65536,
        refill_fraction: float = 0.5,
        buffer_device: str = "auto",
        prefetch: bool = True,
        dtype: Dtype = "float32",
        model_dtype: ModelDtype = "auto",
        model_kwargs: dict[str, Any] | None = None,
        tokenizer: Any = None,
        head: int | None = None,
        drop_special_tokens: bool = True,
        positions: tuple[int, int] | None = None,
        max_norm_multiple: float | None = None,
        center: bool = True,
        scale: bool = True,
        n_validation: int = 32768,
        n_test: int = 131072,
        seed: int = 0,
        largest_saved_buffer: int = 2**30,
    ) -> None:
        super().__init__()
        self.hook_name, self.hook_names = hook_name, checked_names(hook_name)
        self.model = EMBEDDED_MODEL if model == "embedded" else model
        self.text, self.validation_text = text, validation_text
        self.text_column, self.text_split, self.streaming = text_column, text_split, streaming
        self.validation_fraction = 0.0 if validation_text is not None else validation_fraction
        self.document_start = document_start
        self.separator, self.pack, self.keep_rest = separator, pack, keep_rest
        self.chat_roles = None if chat_roles is None else list(chat_roles)
        self.context_length, self.blocks_per_pass = context_length, blocks_per_pass
        self.batch_size, self.buffer_size = batch_size, buffer_size
        self.refill_fraction, self.prefetch = refill_fraction, prefetch
        self.buffer_device, self.dtype = buffer_device, getattr(torch, dtype)
        self.model_dtype = model_dtype
        self.model_kwargs, self.tokenizer, self.head = model_kwargs, tokenizer, head
        self.drop_special_tokens = drop_special_tokens
        self.positions, self.max_norm_multiple = positions, max_norm_multiple
        self.center, self.scale = center, scale
        self.n_validation, self.n_test = n_validation, n_test
        self.seed, self.largest_saved_buffer = seed, largest_saved_buffer
        _check(self)
        self._start()

    def _start(self) -> None:
        """Nothing is read yet."""
        self.buffer: ShuffleBuffer | None = None
        self._scalings: dict[str, Scaling] = {}
        self._passes = {}
        self._restored: dict[str, Any] = {}
        self._left: dict[str, Any] = {}
        self._said = set()
        self._unseen: dict[str, Tensor] = {}  # by hook, shared with what `at` gives

    # What SAEs ask of their data.

    @override
    def text_data(self) -> "ActivationDataModule":
        """Itself."""
        return self

    @override
    def at(self: Data, hook_name: str) -> Data:
        """The same data with only one of its hooks; also during a run.

        Language model, width, filter, source and scaling are those of this hook.
        """
        if not isinstance(self.language_model, SeveralHooks):
            return self
        one, scalings = type(self).__new__(type(self)), self.scalings()
        vars(one).update(vars(self))  # not `copy.copy`, which drops open files and the stream
        one.hook_name, one.hook_names = hook_name, [hook_name]
        one._scalings = {hook_name: scalings[hook_name]} if scalings else {}
        model = self.language_model
        vars(one).update(language_model=model.at_each[hook_name], d_in=model.widths[hook_name])
        vars(one).pop("filter", None)  # holds all hooks
        return one

    @override
    def scaling(self) -> Scaling | None:
        """Centring and scaling estimated on the first full buffer; None if not asked for.

        With several ranks it is estimated on the buffers of all ranks, so every rank must read this
        property. With several hooks each has its own scaling: see `at`.
        """
        return self.scalings().get(self.hook_names[0]) if len(self.hook_names) == 1 else None

    def scalings(self) -> dict[str, Scaling]:
        """`scaling` of each hook; empty if not asked for.

        The first call runs the language model to fill the buffer.
        """
        if not self._scalings and self.buffer is not None and (self.center or self.scale):
            rows = self.buffer.fill() if self.buffer.rows is None else self.buffer.rows
            mean_of_ranks = partial(self.of_all_ranks, operation="mean")
            self._scalings = {
                name: estimate_scaling(part, self.center, self.scale, mean_of_ranks)
                for name, part in self._parts(rows).items()
            }
        return self._scalings

    # Lightning.

    def setup(self, stage: str) -> None:
        """Load the model and check the text, so that bad input is found before any work.

        Raises:
            ValueError: If the run has no end, something waits for an epoch to end, or the text
                gives no block.
        """
        trainer: Any = self.trainer
        if stage == "fit":
            require_an_end(trainer, self.batch_size)
            self._devices()  # refuses one that there is not
        if trainer is not None:
            self.language_model.to(trainer.strategy.root_device)
        if stage == "fit":
            self._require_text(self.training_blocks())
        if stage != "fit" or trainer is None or trainer.limit_val_batches:
            self._require_text(self.held_out_blocks())

    def train_dataloader(self) -> Iterable[Rows]:
        """Shuffled batches, which continue from a checkpoint on resume.

        With `trainer.overfit_batches`, the first ones as a list.
        """
        present = None if self.buffer is None else self.buffer.batch_size
        if begins_anew(self.trainer, self.batch_size, present):
            self._close()
            self._restored = {}
        if self.buffer is None:
            self.buffer = self._new_buffer()
            self._restore(self.buffer)
        return as_asked_for(EndlessBatches(self.buffer, self._batch), self.trainer)

    def _batch(self, rows: Float[Tensor, "rows d"]) -> Rows:
        """Rows of the buffer as training gets them."""
        source = None if self.buffer is None else self.buffer.source
        return self.by_hook(source.restored(rows) if isinstance(source, ActivationStream) else rows)

    def _close(self) -> None:
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None

    def _restore(self, buffer: ShuffleBuffer) -> None:
        state, self._restored = {**self._restored}, {}
        require_same_hooks(state.pop("hook_names", self.hook_names), self.hook_names)
        saved_by = state.pop("rank", 0), state.pop("ranks", 1)
        if state and saved_by != self._place():
            state = {"source": state["source"], "generator": buffer.generator.get_state()}
            warnings.warn(
                f"The checkpoint holds no buffer of rank {self._place()[0]}: it is of a run with "
                "another number of ranks, or this rank's file beside it is missing. The buffer is "
                "refilled with text that follows what rank 0 had read; some may come twice, and "
                "some not at all.",
                stacklevel=2,
            )
        elif state and "rows" not in state:
            warnings.warn(
                "The checkpoint holds no buffer, because it is larger than `largest_saved_buffer`. "
                "The buffer is refilled with the text that follows, so the resumed run is not bit "
                "for bit the same as an uninterrupted one.",
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
            wanted=activations_asked_for(self.trainer, self.batch_size),
            unknown_token=unknown_token(self.language_model.tokenizer),
        )
        return ShuffleBuffer(
            stream,
            self.buffer_size,
            self.batch_size,
            self.refill_fraction,
            self.seed + stream.blocks.rank,
            self.prefetch,
            self._look_at,
            *self._devices(),
        )

    def _devices(self) -> tuple[torch.device, torch.device]:
        """The devices of batches and of the buffer."""
        trainer: Any = self.trainer
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        width = self.d_in if isinstance(self.d_in, int) else sum(self.d_in.values())
        n_rows = self.buffer_size * (1 + self.refill_fraction)  # with those of one refill
        nbytes = n_rows * width * self.dtype.itemsize
        return device, place_of_buffer(self.buffer_device, device, nbytes)

    def _look_at(self, rows: Float[Tensor, "rows d"]) -> None:
        for name, part in self._parts(rows).items():
            require_usable(part, name)
        self._say_unknown()

    def _say_unknown(self) -> None:
        source = None if self.buffer is None else self.buffer.source
        if isinstance(source, ActivationStream):
            source.say_unknown()

    def _parts(self, rows: Float[Tensor, "rows d"]) -> dict[str, Float[Tensor, "rows d_hook"]]:
        parts = self._batch(rows)
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
        """Stop reading ahead, and keep the position for a checkpoint saved after `fit`."""
        if stage == "fit" and self.buffer is not None:
            self._say_unknown()  # unknown characters that came late
            self._left = self.state_dict()
            self._close()
            self._unseen.clear()

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Stop reading ahead, so that the process does not wait for the current fill."""
        if self.buffer is not None:
            self.buffer.close()

    @override
    def unseen(self, n: int) -> Float[Tensor, "n d_in"] | None:
        """Activations of the text that follows, from many documents.

        The first call reads them at all hooks; later calls return the same rows.
        """
        if self.buffer is None or not isinstance(self.buffer.source, ActivationStream):
            return None
        if not self._unseen:
            self.buffer.finish_reading()
            rows, model = self.buffer.source.sample(n), self.buffer.source.model
            by_hook = model.split(rows) if isinstance(model, SeveralHooks) else None
            self._unseen.update(by_hook or {self.hook_names[0]: rows})
        return self._unseen[self.hook_names[0]]

    @override
    def statistics(self) -> dict[str, float]:
        """Counts of tokens read and activations dropped so far; empty before training."""
        source = None if self.buffer is None else self.buffer.source
        return source.statistics() if isinstance(source, ActivationStream) else {}

    @override
    def seconds(self) -> dict[str, float]:
        """Seconds of waiting for batches and of running the model; empty before training."""
        if self.buffer is None:
            return {}
        source = self.buffer.source
        model = source.seconds if isinstance(source, ActivationStream) else 0.0
        return {"buffer": self.buffer.seconds, "language_model": model}

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

    @override
    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or another process: everything but the trainer, the model and open text.

        The copy opens model and text when needed, and its batches continue from here.
        """
        position = self._restored if self.buffer is None else self.state_dict()
        restored = copy.deepcopy(position)
        return {**super().__getstate__(), "buffer": None, "_restored": restored, "_unseen": {}}


def _check(data: ActivationDataModule) -> None:
    """Raise a ValueError if a size is out of range, or no position of a block is kept."""
    names = ("context_length", "blocks_per_pass", "batch_size", "buffer_size")
    require_integers(**{name: getattr(data, name) for name in names})
    require_positive(
        blocks_per_pass=data.blocks_per_pass, n_validation=data.n_validation, n_test=data.n_test
    )
    length, positions = data.context_length, data.positions
    wanted = "at least 2, for a token is predicted from one before it,"
    expect(length >= 2, "context_length", wanted, length)
    check_buffer(data.buffer_size, data.batch_size, data.refill_fraction)
    require_device(data.buffer_device)
    if positions is not None and not 0 <= positions[0] < min(positions[1], length):
        refuse(
            "Expected argument `positions` to be the first position kept and the one after the "
            f"last, within `context_length`={length}, but got {positions}: give two positions of "
            "a block."
        )
