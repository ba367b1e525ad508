"""What the recipe trains with: batches of windows and a LightningModule."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel


class CausalLanguageModel(LightningModule):
    """Next-token prediction with AdamW, linear warm-up and linear decay to zero.

    Args:
        network: The model to train, in place.
        learning_rate: Peak, reached after 5 % of the steps.
        weight_decay: For matrices; biases and norms are not decayed.
        steps: Length of the schedule.
    """

    def __init__(
        self, network: PreTrainedModel, learning_rate: float, weight_decay: float, steps: int
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.steps = steps

    def training_step(self, batch: Int[Tensor, "batch positions"]) -> Float[Tensor, ""]:
        """Returns the mean cross-entropy of a batch, in nats per token."""
        loss = next_token_losses(self.network, batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer and a schedule that is stepped with every batch."""
        matrices = [p for p in self.network.parameters() if p.ndim >= 2]
        vectors = [p for p in self.network.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # Not fused: Lightning refuses to clip gradients of fused optimizers in mixed precision.
        optimizer = torch.optim.AdamW(groups, self.learning_rate, betas=(0.9, 0.95), foreach=True)
        warm_up = max(1, self.steps // 20)

        def scale(step: int) -> float:
            return min((step + 1) / warm_up, 1 - step / self.steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def next_token_losses(
    network: nn.Module, tokens: Int[Tensor, "batch positions"]
) -> Float[Tensor, " predictions"]:
    """Returns the cross-entropy of every token but each row's first, in nats, not reduced."""
    logits = network(input_ids=tokens[:, :-1]).logits
    targets = tokens[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


class ShuffledWindows:
    """Batches of windows of one long row of tokens, cut and shuffled anew in every epoch.

    Consecutive windows share one token, so that each token is once a target.

    Args:
        tokens: The packed documents.
        context: Inputs per window; a window has one token more.
        batch_size: Windows per batch.
        seed: Of the cuts and of the order.

    Raises:
        ValueError: If the tokens do not fill a batch, wherever they are cut.
    """

    def __init__(self, tokens: Int[Tensor, " n"], context: int, batch_size: int, seed: int) -> None:
        needed = context * (batch_size + 1)
        if len(tokens) < needed:
            raise ValueError(
                f"tokens: expected at least {needed} for batches of {batch_size} windows of "
                f"{context}, got {len(tokens)}; give more text, or smaller or fewer windows"
            )
        self.tokens = tokens
        self.context = context
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Int[Tensor, "batch positions"]]:
        """Yields one epoch of full batches."""
        offset = int(torch.randint(self.context, (1,), generator=self.generator))
        windows = self.tokens[offset:].unfold(0, self.context + 1, self.context)
        order = torch.randperm(len(windows), generator=self.generator)
        for rows in order.split(self.batch_size):
            if len(rows) == self.batch_size:
                yield windows[rows]
