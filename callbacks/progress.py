"""One progress bar for the whole run, with the rate in activations; lines for log files."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from lightning_sae.data.source import activations_in
from lightning_sae.distributed.split import copies_of

N_LINES = 10  # number of lines in a run whose output is not a terminal
HELD_OUT = ("l0", "fvu", "loss_recovered_zero", "ce_clean", "ce_spliced")


class SAEProgressBar(TQDMProgressBar):
    """Shows optimizer steps of `trainer.max_steps`, loss, L0, dead share and activations/s.

    If the output goes to a file or a pipe, a line is written instead for each tenth of the run and
    for each validation.

    Args:
        refresh_rate: Batches between two refreshes; 0 hides the bar and the lines.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._activations = 0
        self._since = time.perf_counter()
        self.rate = 0.0
        self._step = 0

    @property
    @override
    def is_enabled(self) -> bool:
        """Whether there is a bar."""
        return super().is_enabled and _is_watched()

    @property
    def writes_lines(self) -> bool:
        """Whether lines are printed instead."""
        return super().is_enabled and not _is_watched()

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Number of batches for `trainer.max_steps`, if that is set."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return super().total_train_batches

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_start()
        self._step = trainer.global_step
        self._activations, self._since = 0, time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._activations += activations_in(batch) * copies_of(trainer).n
        due = self.writes_lines and self._is_due(trainer.global_step, trainer.max_steps)
        if due or (self.refresh_rate and (batch_idx + 1) % self.refresh_rate == 0):
            now = time.perf_counter()
            self.rate = self._activations / (now - self._since)
            self._activations, self._since = 0, now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if due:
            self._write(self.get_metrics(trainer, pl_module))

    def _is_due(self, step: int, total: int) -> bool:
        """Whether a tenth of the run has just ended, or 1000 steps if its length is unknown."""
        every = total / N_LINES if total > 0 else 1000
        new, self._step = step > self._step, step  # otherwise gradients are being accumulated
        return new and int(step / every) > int((step - 1) / every)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._activations, self._since = 0, time.perf_counter()
        if self.writes_lines and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            named = {name: metrics.get(f"val/{name}") for name in HELD_OUT}
            found = {name: f"{value:.4g}" for name, value in named.items() if value is not None}
            if found:  # side by side, each SAE has its own
                self._write({"held out": "", **found})

    def _write(self, values: dict[str, Any]) -> None:
        """One line: the step, and values by name."""
        step, total = self.trainer.global_step, self.trainer.max_steps
        of = f"/{total}" if total > 0 else ""
        cells = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        sys.stdout.write(f"step {step}{of}  " + "  ".join(map(str.rstrip, cells)) + "\n")
        sys.stdout.flush()

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training and self.rate > 0:
            metrics["act/s"] = f"{self.rate:,.0f}"
        return metrics


def _is_watched() -> bool:
    """Whether the output is interactive: a terminal, a notebook or a Python shell."""
    return sys.stdout.isatty() or hasattr(sys, "ps1")
