"""The checkpoint from which a run goes on: regularly, at the end, and when a run is stopped."""

import logging
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message
from typing_extensions import override

from lightning_sae.distributed import remove_other_parts, write_part

log = logging.getLogger("lightning.pytorch")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunCheckpoint(Checkpoint):  # Lightning calls this kind last: what others did is saved too
    """Keeps `<trainer.default_root_dir>/checkpoints/last.ckpt` up to date.

    Saved every `every_n_steps`, at the end, and on Ctrl-C or SIGTERM after the step under way;
    resumed from it, a run gives the weights it would have given uninterrupted. A second Ctrl-C
    stops at once. When training fails, as with a loss that is not finite, `last.ckpt` stays and
    `stopped.ckpt` gets the weights before the failing step; resumed from that one, a run goes on
    behind the failing batch.

    With several ranks, each saves its own buffer and place in the text beside `last.ckpt`, see
    `lightning_sae.distributed`. If one of them fails or is killed, `last.ckpt` is where to go on:
    the others cannot tell what became of it, and save nothing.

    Args:
        every_n_steps: Optimiser steps between two checkpoints.

    Raises:
        ValueError: If `every_n_steps` is not positive; before training, if the folder holds a run
            that is not being resumed.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps <= 0:
            raise ValueError(
                f"Expected argument `every_n_steps` to be positive but got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self._started = False
        self._step_before = self._tried_at = self._saved_at = -1
        self._saving: Path | None = None
        self._saved: Path | None = None
        self._others: list[ModelCheckpoint] = []
        self._received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        kept = trainer.checkpoint_callbacks
        self._others = [other for other in kept if isinstance(other, ModelCheckpoint)]

    @property
    def best_model_path(self) -> str:
        """What Lightning loads for `ckpt_path="best"`, and after a fit where no model is given.

        The best of a `ModelCheckpoint`, where the run has one; else the last that was saved.
        """
        paths = [other.best_model_path for other in self._others]
        return next(filter(None, paths), str(self._saved or ""))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup, where the trainer does not yet tell whether it resumes.
        require_new_run(self.folder.parent, trainer.ckpt_path, ("checkpoints",))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._started = None, True
        for number in SIGNALS:
            try:
                self._handlers[number] = signal.signal(number, self._note)
            except ValueError:  # outside the main thread, signals are somebody else's matter
                return

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._give_signals_back()  # a second one acts at once

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_before:  # gradients are being accumulated
            return
        stop = self._received is not None
        if trainer.world_size > 1:  # a signal may reach one rank only, or at different steps
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, "last.ckpt")
        if stop:
            raise KeyboardInterrupt

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_signals_back()
        self._started = False
        if self._tried_at != trainer.global_step:
            self._save(trainer, "last.ckpt")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_signals_back()
        if not self._started or trainer.global_step == 0:
            return
        # Saving needs all ranks, and the others may be anywhere.
        if self._tried_at != trainer.global_step and trainer.world_size == 1:
            with suppress(FloatingPointError):  # weights that are not finite are not worth keeping
                self._save(trainer, "stopped.ckpt")
        text = f"Stopped after {trainer.global_step} optimiser steps; "
        path = self._saved or trainer.ckpt_path
        if path is None:
            text += "there is no checkpoint yet."
        else:
            of_step = "" if self._saved is None else f", of step {self._saved_at}"
            text += (
                f"the checkpoint is {path}{of_step}\n"
                f"Go on with the same command and --ckpt_path {path}"
            )
        rank = trainer.global_rank if trainer.world_size > 1 else None
        log.info("\n" + rank_prefixed_message(text, rank))

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saving, self._tried_at = self.folder / name, trainer.global_step
        try:
            trainer.save_checkpoint(self._saving, weights_only=False)
            self._saved, self._saved_at = self._saving, self._tried_at
        finally:
            self._saving = None
        if trainer.world_size > 1:
            remove_other_parts(self._saved, trainer.global_step)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """With several ranks: write this rank's part, and wait for those of the others."""
        if self._saving is None or trainer.world_size == 1:
            return
        if not trainer.is_global_zero:
            pl_module.on_save_checkpoint(checkpoint)  # Lightning would call it only later
            write_part(self._saving, trainer.global_rank, checkpoint)
        trainer.strategy.barrier()

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def require_new_run(folder: Path, ckpt_path: str | Path | None, parts: tuple[str, ...]) -> None:
    """Raise a ValueError if `folder` holds one of a run's `parts` and that run is not resumed."""
    held = [name for name in parts if (folder / name).exists()]
    inside = ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents
    if held and not inside:
        raise ValueError(
            f"Expected argument `trainer.default_root_dir` to be a new folder but {folder} holds a "
            f"run ({', '.join(held)}), which is not overwritten: choose another folder, or go on "
            f"with that run by --ckpt_path {folder / 'checkpoints' / 'last.ckpt'}"
        )
