"""Held-out data and a trained SAE: validation, test, prediction."""

from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override


class EvaluatedOnHeldOut(LightningModule):
    """The half of an SAE that is measured and not trained; `encode` and `decode` are its own.

    Attributes:
        metrics: The held-out metrics, in raw space.
        held_out_frequency: Of each latent at the last evaluation.
        held_out_count: Activations of the evaluation in progress, over all ranks.
    """

    metrics: MetricCollection
    held_out_frequency: Float[Tensor, " d_sae"] | None = None
    held_out_count: int = 0

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Latent activations of raw activations."""
        raise NotImplementedError

    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """Raw activations rebuilt from latent activations."""
        raise NotImplementedError

    @override
    def validation_step(self, batch: Float[Tensor, "batch d_in"], batch_idx: int) -> None:
        """Add a batch of held-out activations to the metrics, in raw space."""
        f = self.encode(batch)
        self.metrics.update(x=batch, x_hat=self.decode(f), f=f)
        self.held_out_count += len(batch) * self.trainer.world_size

    @override
    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self.held_out_count = 0

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the held-out metrics as `val/...`."""
        self._log_metrics("val")

    @override
    def on_test_epoch_start(self) -> None:
        """Count anew."""
        self.held_out_count = 0

    @override
    def test_step(self, batch: Float[Tensor, "batch d_in"], batch_idx: int) -> None:
        """Add a batch of held-out activations to the metrics, in raw space."""
        self.validation_step(batch, batch_idx)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the held-out metrics as `test/...`."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        values = self.metrics.compute()
        self.held_out_frequency = values.pop("frequency")
        named = {f"{stage}/{name}": value.float() for name, value in values.items()}
        # The same on all ranks already, as Lightning cannot see.
        self.log_dict(named, sync_dist=True)
        self.metrics.reset()

    @override
    def predict_step(
        self, batch: Float[Tensor, "batch d_in"], batch_idx: int
    ) -> Float[Tensor, "batch d_sae"]:
        """Latent activations of a batch."""
        return self.encode(batch)
