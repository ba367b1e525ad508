"""The threshold of a `BatchTopKSAE` at the end of its training."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.data.source import source_of

ACTIVATIONS = 2**15


class ThresholdCalibration(Callback):
    """Set the threshold when training ends, so that unseen activations have k active latents.

    The running threshold lags behind the weights, and is that of the text which was just trained
    on. So when training ends, the SAE's `calibrate` is given activations that no step has seen:
    those of `ActivationSource.unseen`, which `ActivationDataModule` reads from many documents of
    the text that follows, and `CachedDataModule` takes from rows that are left in its first pass or
    from held-out rows that are not evaluated. They are as many as in training, up to 32,768 on each
    rank. With data that has none, such as a cache that was read as a whole, the running threshold
    is kept.

    On text that was not trained on either, L0 is off by as much as documents differ. Three seeds,
    after 100 and 400 steps of 64 activations, k 32 and 512 latents, 65,536 activations each:

    ==================================  =============  =============
    activations                         Python source  stories
    ==================================  =============  =============
    unseen training text, many          31.7 to 32.2   31.9 to 32.1
    documents, other than the sample
    unseen training text, in order      31.0 to 35.7   31.8 to 32.1
    held-out text, in order             30.0 to 33.2   31.5 to 33.2
    the first 8,192 of these            29.9 to 36.0   31.4 to 33.2
    ==================================  =============  =============

    Eighths of one held-out text of source code, 8,192 activations of a few files each, have an L0
    between 22.2 and 36.0. A larger sample would not change this: the first row is what another one
    of 65,536 activations has.

    Every `BatchTopKSAE` adds this callback. It does not move the training stream or the running
    means: a prolonged run is the same as one that did not end here.
    """

    def __init__(self) -> None:
        self._rows = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch is None:  # which Lightning skips
            return
        self._rows = len(batch)
        if trainer.global_step == trainer.max_steps:  # before the checkpoint of this step
            self._calibrate(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != trainer.max_steps and _is_last_epoch(trainer):
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: Trainer, pl_module: Any) -> None:
        data = source_of(trainer)
        if data is None or trainer.fast_dev_run or trainer.overfit_batches:  # type: ignore[attr-defined]
            return
        seen = self._rows * trainer.global_step * trainer.accumulate_grad_batches
        rows = data.unseen(min(ACTIVATIONS, seen))
        if rows is not None:
            pl_module.calibrate(rows.to(pl_module.device))


def _is_last_epoch(trainer: Trainer) -> bool:
    stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
    return bool(stopped or trainer.current_epoch + 1 == trainer.max_epochs)
