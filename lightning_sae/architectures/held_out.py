"""Evaluation on held-out activations, as Lightning's `validate`, `test` and `predict` do it."""

import warnings
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_sae.distributed.parts import ALONE, Parts
from lightning_sae.distributed.ranks import trainer_of
from lightning_sae.distributed.split import copies_of
from lightning_sae.tensors import require_batch
from lightning_sae.training.supported import require_one_loader


class Evaluated(LightningModule, ABC):
    """Base class with the validation, test and prediction steps of an SAE.

    Attributes:
        metrics: The held-out metrics, of raw activations.
        held_out_frequency: Firing frequency of each latent at the last evaluation.
        held_out_count: Number of activations in the current evaluation, over all ranks.
    """

    d_in: int
    d_sae: int
    parts: Parts = ALONE
    metrics: MetricCollection
    held_out_frequency: Float[Tensor, " d_sae"] | None = None
    held_out_count: int = 0
    _held_out_not_finite: int = 0

    @abstractmethod
    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Latents of raw activations."""

    @abstractmethod
    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """Raw activations reconstructed from latents."""

    @override
    def validation_step(
        self, batch: Float[Tensor, "batch d_in"], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch of held-out raw activations to the metrics.

        Raises:
            ValueError: If `batch` is not of shape [batch, d_in], or there are several loaders.
        """
        require_one_loader(dataloader_idx)
        require_batch(batch, self.d_in)
        self._held_out_not_finite += int((~torch.isfinite(batch)).any(-1).sum())
        # A split dictionary may be so large that the latents of a whole batch are not.
        size = len(batch) if self.parts.n == 1 else max(1, 2**25 // self.d_sae)
        for rows in batch.split(max(1, size)):
            f = self.encode(rows)
            self.metrics.update(x=rows, x_hat=self.decode(f), f=f)
        trainer = trainer_of(self)
        self.held_out_count += len(batch) * (1 if trainer is None else copies_of(trainer).n)

    @override
    def on_validation_epoch_start(self) -> None:
        """Reset the counts."""
        self.held_out_count = self._held_out_not_finite = 0

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the held-out metrics as `val/...`."""
        self._log_metrics("val")

    @override
    def on_test_epoch_start(self) -> None:
        """Reset the counts."""
        self.held_out_count = self._held_out_not_finite = 0

    @override
    def test_step(
        self, batch: Float[Tensor, "batch d_in"], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch of held-out raw activations to the metrics."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the held-out metrics as `test/...`."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        if self._held_out_not_finite:
            warnings.warn(
                f"{self._held_out_not_finite} held-out activations are not finite, so neither are "
                "the metrics: check the model and its dtype, or leave them out with "
                "`data.max_norm_multiple`.",
                stacklevel=2,
            )
        values = self.metrics.compute()
        self.held_out_frequency = values.pop("frequency")
        named = {f"{stage}/{name}": value.float() for name, value in values.items()}
        # Already the same on all ranks, but Lightning warns without `sync_dist`.
        self.log_dict(named, sync_dist=True)
        self.metrics.reset()

    @override
    def predict_step(
        self, batch: Float[Tensor, "batch d_in"], batch_idx: int
    ) -> Float[Tensor, "batch d_sae"]:
        """Latent activations of a batch."""
        require_batch(batch, self.d_in)
        return self.encode(batch)
