"""The checkpoint to resume from: saved regularly, at the end, and when a run is stopped."""

import logging
import shlex
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message, rank_zero_warn
from typing_extensions import override

from lightning_sae.callbacks.run_folder import hold, release, require_new_run
from lightning_sae.checks import require_positive
from lightning_sae.distributed.ranks import remove_other_parts, write_part
from lightning_sae.distributed.split import copies_of, parts_of
from lightning_sae.files import remove_unfinished

log = logging.getLogger("lightning.pytorch")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunCheckpoint(Checkpoint):  # called last, so the state of all others is saved too
    """Keeps `<trainer.default_root_dir>/checkpoints/last.ckpt` up to date.

    It is saved every `every_n_steps`, at the end, and on Ctrl-C or SIGTERM after the current step.
    A run that is resumed from it gives the same weights as an uninterrupted one. A second Ctrl-C
    stops at once. When training fails, for example with a loss that is not finite, `last.ckpt` is
    kept and `stopped.ckpt` gets the weights before the failing step; a run that is resumed from
    that one continues after the failing batch.

    With several ranks, each rank saves its own buffer and position in the text next to `last.ckpt`,
    see `lightning_sae.distributed.ranks`. If a rank fails or is killed, the other ranks save
    nothing, and `last.ckpt` is the one to resume from.

    If a validation was due at the checkpoint's step and had not been done, it is done on resume.
    Torch's CPU generator continues from its saved state. See `docs/resuming.md`.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.

    Raises:
        ValueError: If `every_n_steps` is not positive; before training, if the folder holds a run
            that is not being resumed, or another process trains there.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        require_positive(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._holds = self._started = False
        self._before_validation = False  # whether one is due, while a checkpoint is being saved
        self._restored: dict[str, Any] = {}
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
        self._restored = {}
        if stage == "fit":
            self._hold(trainer)

    @property
    def best_model_path(self) -> str:
        """The checkpoint that Lightning loads for `ckpt_path="best"`, and by default after `fit`.

        The best of a `ModelCheckpoint` if the run has one, otherwise the last that was saved.
        """
        paths = [other.best_model_path for other in self._others]
        return next(filter(None, paths), str(self._saved or ""))

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Take over what spawned processes saved, as `ddp_spawn` and `ddp_fork` report it."""
        self._saved = Path(path) if path else None

    def _hold(self, trainer: Trainer) -> None:
        """Lock the run's folder; if rank 0 cannot, all ranks raise an error."""
        refusal = None
        if trainer.is_global_zero:
            try:
                hold(self.folder.parent)
                self._holds = True
            except ValueError as error:
                refusal = str(error)
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise ValueError(refusal)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._holds:
            release(self.folder.parent)
        self._holds = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup, where the trainer does not yet tell whether it resumes.
        require_new_run(self.folder.parent, trainer.ckpt_path)
        if trainer.is_global_zero:
            for name in ("last.ckpt", "stopped.ckpt"):
                remove_unfinished(self.folder, name)
        if is_overridden("on_train_batch_end", pl_module):
            rank_zero_warn(
                f"`{type(pl_module).__name__}.on_train_batch_end` comes after the checkpoint of "
                "its step, as Lightning calls them, and is lost when a run resumes from there: "
                "have a callback do it, which `configure_callbacks` may bring along."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._started = None, True
        if "generator" in self._restored:
            torch.set_rng_state(self._restored["generator"])
        if self._restored.get("before_validation"):
            _validate_first(trainer)
        for number in SIGNALS:
            try:
                self._handlers[number] = signal.signal(number, self._note)
            except ValueError:  # outside the main thread, signal handlers cannot be set
                return

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._give_signals_back()  # a second signal acts at once

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
            due = _validation_is_due(trainer)
            # After the last step the validation comes first, because a run that has ended would
            # not do it on resume.
            if stop or not (due and trainer.global_step == trainer.max_steps):
                self._before_validation = due
                self._save(trainer, "last.ckpt")
                self._before_validation = False
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
        if self._started and trainer.global_step > 0:
            self._save_and_tell(trainer)
        self._release()

    def _save_and_tell(self, trainer: Trainer) -> None:
        # Saving needs all ranks, and the others may be anywhere.
        if self._tried_at != trainer.global_step and trainer.world_size == 1:
            with suppress(FloatingPointError):  # do not save weights that are not finite
                self._save(trainer, "stopped.ckpt")
        text = f"Stopped after {trainer.global_step} optimizer steps; "
        path = self._saved or trainer.ckpt_path
        if path is None:
            text += "there is no checkpoint yet."
        else:
            of_step = "" if self._saved is None else f", of step {self._saved_at}"
            text += (
                f"the checkpoint is {path}{of_step}\n"
                f"Continue with the same command and --ckpt_path {shlex.quote(str(path))}"
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
        if copies_of(trainer).n > 1:
            remove_other_parts(self._saved, trainer.global_step)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """With several ranks, write this rank's part and wait for the other ranks.

        Ranks that hold a split dictionary together have one state, which the first of them writes.
        """
        copy = copies_of(trainer)
        if self._saving is None or copy.n == 1:
            return
        if copy.own > 0:
            pl_module.on_save_checkpoint(checkpoint)  # Lightning would call it only later
            if parts_of(trainer).index == 0:
                write_part(self._saving, copy.own, checkpoint)
        trainer.strategy.barrier()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of torch's generator, and whether a validation is due."""
        return {
            "generator": torch.get_rng_state(),
            "before_validation": self._before_validation,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of training."""
        self._restored = state_dict

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _validation_is_due(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _validate_first(trainer: Trainer) -> None:
    """Start a resumed run with the validation that was due at its checkpoint.

    Lightning does a validation on resume only if it was interrupted, so it is marked as such.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.val_loop.batch_progress.reset_on_run()
    loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
    # The loop counts the last step when it continues, and again after the validation.
    loop._batches_that_stepped -= 1
