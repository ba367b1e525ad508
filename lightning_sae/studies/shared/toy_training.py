"""Train SAEs on toy activations by a Trainer with minimal overhead."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.shared.pool import Report


def train_on_toy(
    sae: SparseAutoencoder, data: ToyDataModule, steps: int, callbacks: Sequence[Callback]
) -> None:
    """Train an SAE on the CPU and put it into evaluation mode.

    `barebones` leaves out all logging: at this size a step's calls of `self.log` cost more than the
    step, and they are not read.
    """
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            barebones=True,
            max_steps=steps,
            limit_val_batches=0,
            callbacks=list(callbacks),
        )
        trainer.fit(sae, datamodule=data)
    sae.eval()


class Progress(Callback):
    """Reports the number of activations trained on.

    Args:
        report: Called with the activations since its last call.
        every: Steps between two calls.
    """

    def __init__(self, report: Report, every: int = 100) -> None:
        self.report, self.every = report, every

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.report(self.every * len(batch))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages about each run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", "GPU available but not used")
            warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\)")
            yield
    finally:
        logger.setLevel(level)
