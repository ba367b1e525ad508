"""The half of an SAE that Lightning asks about its optimiser."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.architectures.optimizer import adam_with_schedule, clip_norm
from lightning_sae.functional.sparse.code import Layout


class Optimised(LightningModule):
    """A module trained by fused Adam with a schedule; see `SparseAutoencoder` for its settings."""

    lr: float
    betas: tuple[float, float]
    lr_warmup_steps: int
    lr_decay_steps: int
    clip_grad_norm: float | None
    layout: Layout

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, in groups that may have a learning rate of their own."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Fused Adam with warm-up and decay of the learning rate."""
        return adam_with_schedule(
            self.parameter_groups(),
            lr=self.lr,
            betas=self.betas,
            warmup=0 if self.trainer.fast_dev_run else self.lr_warmup_steps,  # type: ignore
            decay=0 if self.trainer.fast_dev_run else self.lr_decay_steps,  # type: ignore
            total=self.trainer.max_steps,
            # A fused step unscales fp16 gradients itself, which Lightning cannot clip.
            fused=self.trainer.precision != "16-mixed",
        )

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the trainer's own setting where it has one, else by `clip_grad_norm`.

        Done here, for Lightning refuses to clip for a fused optimiser under any mixed precision,
        though only fp16's scaled gradients are in its way, and there Adam is not fused.
        """
        value = self.clip_grad_norm if gradient_clip_val is None else gradient_clip_val
        if not value:  # Lightning's 0 does not clip
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), value)
        else:
            clip_norm(optimizer, value)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Forget the gradients, and leave their memory to those that come.

        So who keeps a gradient beyond its step keeps a copy.
        """
        # Only sparse steps take it, and several ranks may have it in the buckets they exchange.
        if not self.layout.dense and self.trainer.world_size == 1:
            self.layout.workspace.recycle(parameter.grad for parameter in self.parameters())
        optimizer.zero_grad()
