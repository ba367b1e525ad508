"""Data parallel training: what the ranks of a run have to find out together.

Each rank evaluates the objective on its own batch, and Lightning's strategy averages gradients.
That is the gradient of all batches together for every term that is a mean over rows. Whatever is
not one (a selection among all rows, a ratio of sums, the square of a mean) asks the other ranks
here. Ranks have batches of equal size.

Equally many, too: the data modules of this package never end. Where other loaders have not, an
epoch ends for all ranks with the shortest; validation loaders must have one length.
"""

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override


class AmongRanks(LightningModule):
    """A module that may be one of several copies in training.

    All ranks must call these methods in the same order. Outside of training, and on one rank, each
    gives its argument back.
    """

    @property
    def n_ranks(self) -> int:
        """Copies that are being trained."""
        if self._trainer is None or not self.trainer.training:
            return 1
        return self.trainer.world_size

    def mean_of_ranks(self, value: Tensor) -> Tensor:
        """The mean over all ranks, a constant to the gradient."""
        return self._reduced(value, "mean")

    def least_of_ranks(self, value: Tensor) -> Tensor:
        """The least of all ranks, elementwise."""
        return self._reduced(value, "min")

    def sum_of_ranks(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self._reduced(value, "sum")

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        if self.n_ranks == 1:
            return value
        # On a copy, for `reduce` works in place.
        value = value.detach().to(self.device, copy=True)
        return self.trainer.strategy.reduce(value, reduce_op=operation)

    def mean_with_gradient(self, value: Tensor) -> Tensor:
        """The mean over all ranks, whose gradient is that of this rank's share of it.

        Of a function of it each rank then has its own share of the gradient, and the mean over
        ranks, which the strategy takes, is the whole.
        """
        if self.n_ranks == 1:
            return value
        return value + (self.mean_of_ranks(value) - value.detach())

    def gathered(self, values: Float[Tensor, " n"]) -> Float[Tensor, "ranks n"]:
        """The vectors of all ranks, in their order."""
        if self.n_ranks == 1:
            return values.unsqueeze(0)
        return self.trainer.strategy.all_gather(values)

    # Loaders of different lengths.

    _asks_for_the_last = False

    @override
    def on_train_epoch_start(self) -> None:
        """Have all ranks train on equally many batches, as far as lengths are known."""
        if self.n_ranks == 1:
            return
        loop, share = self.trainer.fit_loop, self.trainer.val_check_interval
        own = torch.tensor(float(loop.max_batches))
        least, most = self.least_of_ranks(own), -self.least_of_ranks(-own)
        self._asks_for_the_last = bool(most.isinf())
        if least != most and not self._asks_for_the_last:
            loop.max_batches = int(least)
            if isinstance(share, float):
                self.trainer.val_check_batch = max(1, int(share * loop.max_batches))

    def end_with_the_first(self) -> None:
        """Where lengths are not known, end an epoch with the last batch of the first rank to end.

        To be called with each batch.
        """
        if self._asks_for_the_last:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            is_last = self.sum_of_ranks(torch.tensor(float(progress.is_last_batch)))
            # What Lightning reads to step with accumulated gradients, to validate and to end.
            progress.is_last_batch = bool(is_last > 0)
