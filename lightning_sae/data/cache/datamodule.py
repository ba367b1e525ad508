"""Activations from disk or memory as a LightningDataModule, without model or text."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import expect, require_integers, require_positive
from lightning_sae.data.cache.foreign import NAMELESS
from lightning_sae.data.cache.manifest import (
    Split,
    is_cache,
    read_manifest,
    require_complete,
)
from lightning_sae.data.cache.rows import ByHook
from lightning_sae.data.cache.shards import require_hashes
from lightning_sae.data.cache.shuffled import ShuffledRows
from lightning_sae.data.cache.stored import Activations, StoredActivations
from lightning_sae.data.load_model import LoadedModel
from lightning_sae.data.loaders import Rows, as_asked_for, begins_anew, require_an_end
from lightning_sae.data.notices import OFTEN, activations_asked_for
from lightning_sae.data.scaling import require_usable
from lightning_sae.data.several_hooks import checked_names
from lightning_sae.data.text import Text

log = logging.getLogger("lightning.pytorch")

LOOKED_AT = 2**13
"""Number of evenly spaced rows that are checked before a run."""

LARGE = 2**30
"""Size in bytes from which the check of hashes is announced, because it takes a while."""


class HeldOutRows:
    """This rank's share of the held-out rows, in order; equally many on each rank.

    Args:
        data: The data module.
        n: Maximum number of rows.
    """

    def __init__(self, data: "CachedDataModule", n: int) -> None:
        rows, (rank, n_ranks) = data.rows("held_out"), data.place()
        self.n = min(n, len(rows) // n_ranks)
        first = len(rows) // n_ranks * rank
        self.rows, self.data = rows.between(first, first + self.n), data

    def __len__(self) -> int:
        return math.ceil(self.n / self.data.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        size = self.data.batch_size
        for start in range(0, self.n, size):
            batch = self.rows.between(start, start + size).all()
            yield self.data.by_hook({name: rows.float() for name, rows in batch.items()})


class CachedDataModule(StoredActivations):
    """Batches of stored activations: a cache, files, or a tensor.

    A cache is written by `lightning-sae cache`. It is read without its model or text, in random
    order over all rows, in bounded memory. Training is endless: its length is `trainer.max_steps`;
    each pass over the rows has a different order. Validation and test read the cache's held-out
    documents; for other activations, the last rows. Commands such as `test` load the model and text
    named in the manifest to measure the language model's loss.

    Args:
        activations: Folder of a cache; a .npy or .safetensors file, or a folder or list of such
            files; or, from Python, a tensor or array [..., d], or a dictionary of them by hook.
            Files are mapped, not loaded.
        hook_name: Hook to train on, or several, for `SideBySide`; by default all stored hooks. For
            activations without a hook name, the name to give them.
        batch_size: Activations in a batch.
        buffer_size: Activations read and shuffled at a time; about three times as many are in
            memory.
        rows_together: Number of neighbouring rows read as one piece. With 1, all orders of the rows
            are equally likely. null means 1 up to 4 GiB, and pieces of 64 KiB above, which are fast
            to read from disk.
        prefetch: Read ahead in a thread while batches are trained on.
        validation_fraction: For activations that are not a cache, the share of rows held out, taken
            from the end.
        center: Have the SAE subtract the mean activation.
        scale: Have the SAE scale activations to mean norm sqrt(d_in).
        n_validation: Maximum number of held-out activations per validation and rank.
        n_test: Maximum number of held-out activations per test and rank.
        seed: Seed of the order of rows.
        verify: Check the hash of each file of a cache before a run.
        evaluation_model: Language model for metrics that need one, such as loss recovered, if the
            cache does not name it or it has moved; as `model` of `ActivationDataModule`.
        evaluation_text: Its text; as `text` of `ActivationDataModule`.

    Raises:
        ValueError: If the cache does not exist or is incomplete, a file is missing or truncated, or
            the cache has no such hook; from `setup`, if a file was altered.

    Example:
        >>> import torch
        >>> data = CachedDataModule(torch.randn(1000, 8), batch_size=100)
        >>> data.d_in, next(iter(data.train_dataloader())).shape
        (8, torch.Size([100, 8]))
    """

    def __init__(
        self,
        activations: Activations,
        hook_name: str | Sequence[str] | None = None,
        *,
        batch_size: int = 2048,
        buffer_size: int = 65536,
        rows_together: int | None = None,
        prefetch: bool = True,
        validation_fraction: float = 0.1,
        center: bool = True,
        scale: bool = True,
        n_validation: int = 32768,
        n_test: int = 131072,
        seed: int = 0,
        verify: bool = True,
        evaluation_model: str | Path | LoadedModel | None = None,
        evaluation_text: Text | None = None,
    ) -> None:
        super().__init__()
        require_integers(batch_size=batch_size, buffer_size=buffer_size)
        require_positive(batch_size=batch_size, n_validation=n_validation, n_test=n_test)
        require_positive(**({} if rows_together is None else {"rows_together": rows_together}))
        within = 0 <= validation_fraction < 1
        expect(within, "validation_fraction", "from 0 to below 1", validation_fraction)
        size = f"at least `batch_size`={batch_size}"
        expect(buffer_size >= batch_size, "buffer_size", size, buffer_size)
        self.activations, self.hook_name = activations, hook_name
        self.batch_size, self.buffer_size = batch_size, buffer_size
        self.rows_together, self.prefetch = rows_together, prefetch
        self.validation_fraction = validation_fraction
        self.center, self.scale = center, scale
        self.n_validation, self.n_test = n_validation, n_test
        self.seed, self.verify = seed, verify
        self.evaluation_model, self.evaluation_text = evaluation_model, evaluation_text
        self.folder = self._cache_folder()
        self.manifest = None
        if self.folder is not None:
            self.manifest = read_manifest(self.folder)
            require_complete(self.folder, self.manifest)
        names = [] if hook_name is None else checked_names(hook_name)
        self._names = self._checked(names)
        present = self.rows("training").widths
        self.hook_names = () if [*present] == [NAMELESS] else [*present]
        self.d_in: Any = present if len(present) > 1 else next(iter(present.values()))
        self.batches: ShuffledRows | None = None
        self._restored: dict[str, Any] = {}
        self._left: dict[str, Any] = {}
        self._verified: set[Split] = set()
        self._whole: CachedDataModule | None = None  # set by `at` for one hook
        if len(self.rows("training")) < batch_size:
            raise ValueError(
                f"Expected argument `batch_size` to be at most {len(self.rows('training')):,}, the "
                f"number of training rows, but got {batch_size}: make it smaller."
            )

    def _cache_folder(self) -> Path | None:
        """The folder of the cache; None for other activations."""
        if not isinstance(self.activations, str | Path):
            return None
        folder = Path(self.activations).expanduser()
        return folder if is_cache(folder) or any(folder.glob("part-*.json")) else None

    def _checked(self, names: list[str]) -> list[str]:
        """Hooks to read; all hooks of the cache if none are named."""
        if self.manifest is None:
            return names
        missing = [name for name in names if name not in self.manifest.widths]
        if missing:
            raise ValueError(
                f"Expected argument `hook_name` to be one of {', '.join(self.manifest.widths)}, "
                f"which the cache {self.folder} has, but got {', '.join(missing)}: choose one of "
                "these, or write a cache of that hook."
            )
        return names or [*self.manifest.widths]

    def setup(self, stage: str) -> None:
        """Check that the run ends and that the cache is unaltered.

        Raises:
            ValueError: If the run has no end, something waits for the end of an epoch, a file was
                altered, or held-out rows are needed and there are none.
        """
        splits: list[Split] = ["training"] if stage == "fit" else []
        if stage == "fit":
            require_an_end(self.trainer, self.batch_size)
        if stage != "fit" or self.trainer is None or self.trainer.limit_val_batches:
            splits.append("held_out")
        for split in splits:
            self._verify(split)
        if stage == "fit":
            for name, rows in self._spread(LOOKED_AT).items():
                require_usable(rows, name)
            self._say_passes()
        if stage != "fit" and not len(self.rows("held_out")):
            raise ValueError(
                "Expected held-out activations to evaluate on but there are none: raise "
                "`validation_fraction`, or write a cache with some `--held_out`."
            )

    def _verify(self, split: Split) -> None:
        if self.manifest is None or self.folder is None or split in self._verified:
            return
        if self.verify:
            (rank, n_ranks), failure = self.place(), None
            shards = self.manifest.shards[split][rank::n_ranks]
            if sum(shard.nbytes for shard in shards) > LARGE:
                log.info("Comparing all files with their hashes; `verify=False` skips this.")
            try:
                require_hashes(self.folder, shards)
            except ValueError as error:
                failure = error
            self._end_together(failure)
        self._verified.add(split)

    def _end_together(self, failure: ValueError | None) -> None:
        """Raise this rank's error, or report that another rank has one."""
        fine = failure is None
        if self.place()[1] > 1:
            fine = self.trainer.strategy.reduce_boolean_decision(fine)  # type: ignore[union-attr]
        if not fine:
            raise failure or ValueError("Another rank found an altered shard; it says which.")

    @rank_zero_only
    def _say_passes(self) -> None:
        wanted, n = activations_asked_for(self.trainer, self.batch_size), len(self.rows("training"))
        times = (wanted or 0) * self.place()[1] / n
        if times > OFTEN:
            log.warning(
                "The run reads its activations about %.3g times: there are %s, and `max_steps` "
                "asks for %s. Give more, or a smaller `max_steps`.",
                times,
                f"{n:,}",
                f"{times * n:,.0f}",
            )

    def train_dataloader(self) -> Iterable[Rows]:
        """Endless rows in random order, continuing from a checkpoint.

        With `trainer.overfit_batches` the first batches, as a list.
        """
        present = None if self.batches is None else self.batches.batch_size
        if begins_anew(self.trainer, self.batch_size, present):
            self._close()
            self._restored = {}
        if self.batches is None:
            self.batches = self._new_batches()
            state, self._restored = self._restored, {}
            if state:
                self.batches.load_state_dict(state)
        return as_asked_for(self.batches, self.trainer)

    def _new_batches(self) -> ShuffledRows:
        rank, n_ranks = self.place()
        return ShuffledRows(
            self.rows("training"),
            self.batch_size,
            self.buffer_size,
            self.rows_together,
            self.seed,
            rank=rank,
            n_ranks=n_ranks,
            prefetch=self.prefetch,
            given_as=self._batch,
        )

    def _batch(self, rows: ByHook) -> Rows:
        """Rows as training gets them: in pinned memory if they go to a GPU, see `devices`."""
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device.type
        if device == "cuda":
            rows = {name: part.pin_memory() for name, part in rows.items()}
        return self.by_hook(rows)

    def _close(self) -> None:
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def val_dataloader(self) -> Iterable[Rows]:
        """Held-out activations in order."""
        return HeldOutRows(self, self.n_validation)

    def test_dataloader(self) -> Iterable[Rows]:
        """Held-out activations in order."""
        return HeldOutRows(self, self.n_test)

    def predict_dataloader(self) -> Iterable[Rows]:
        """Held-out activations in order."""
        return HeldOutRows(self, self.n_test)

    def teardown(self, stage: str) -> None:
        """Keep the position for a checkpoint saved after `fit`; a new `fit` starts over."""
        if stage == "fit" and self.batches is not None:
            self._left = self.state_dict()
            self._close()

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Stop reading ahead, so that the process does not wait for it."""
        if self.batches is not None:
            self.batches.close()

    @override
    def unseen(self, n: int) -> Float[Tensor, "n d_in"] | None:
        """Training rows that no step has read, or held-out rows that no evaluation reads.

        None if there are not so many, as in a run that has read all rows.
        """
        batches = self.batches if self._whole is None else self._whole.batches
        rows = None if batches is None else batches.unread(n)
        if rows is None:
            (rank, n_ranks), held_out = self.place(), self.rows("held_out")
            share = len(held_out) // n_ranks
            first = share * rank + max(self.n_validation, self.n_test)
            if share * (rank + 1) - first < n:
                return None
            rows = held_out.between(first, first + n).all()
        return rows[next(iter(self.rows("training").widths))].float()

    @override
    def statistics(self) -> dict[str, float]:
        """Passes over the rows so far; empty before training."""
        return {} if self.batches is None else {"passes": self.batches.passes}

    def state_dict(self) -> dict[str, Any]:
        """Position of training in the rows, for an exact resume."""
        return (self._restored or self._left) if self.batches is None else self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the batches that `train_dataloader` makes."""
        self._restored = state_dict

    @override
    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or another process: all but the trainer and open files or models."""
        stands = self._restored if self.batches is None else self.state_dict()
        return {**super().__getstate__(), "batches": None, "_restored": {**stands}}
