"""One progress bar for the whole run, with the rate in activations."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override


class SAEProgressBar(TQDMProgressBar):
    """Shows optimizer steps of `trainer.max_steps`, loss, L0, dead share and activations/s.

    Args:
        refresh_rate: Batches between two refreshes; 0 hides the bar.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._activations = 0
        self._since = time.perf_counter()
        self.rate = 0.0

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Batches that `trainer.max_steps` takes, where that is set."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return super().total_train_batches

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rows = next(iter(batch.values())) if isinstance(batch, dict) else batch  # by hook
        self._activations += len(rows) * trainer.world_size
        if self.refresh_rate and (batch_idx + 1) % self.refresh_rate == 0:
            now = time.perf_counter()
            self.rate = self._activations / (now - self._since)
            self._activations, self._since = 0, now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._activations, self._since = 0, time.perf_counter()

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training and self.rate > 0:
            metrics["act/s"] = f"{self.rate:,.0f}"
        return metrics
