"""A sparsity penalty that comes into force gradually."""

from typing import Any, cast

from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.callbacks.checks import refuse_second


class L1Warmup(Callback):
    """Raise the sparsity penalty linearly from zero over the first steps of the optimiser.

    The share in force at the k-th step of a fit, counted from 1, is min(1, k / `n_steps`); it
    multiplies the penalty's coefficient, of L1 or another, through the SAE's `penalty_scale`, and
    is logged as `train/penalty_scale`. Micro-batches of one step share one value. A resumed fit
    goes on where it was; any other fit starts a warm-up of its own. The SAE is left with the whole
    penalty.

    Example::

        trainer = Trainer(callbacks=L1Warmup(n_steps=1000), max_steps=20_000)

    Args:
        n_steps: Steps of the optimiser until the penalty is in full force.

    Raises:
        ValueError: If `n_steps` is not positive; when fitting starts, if it is longer than the
            run, if the SAE has no penalty, or if the trainer has this callback twice.
    """

    def __init__(self, n_steps: int) -> None:
        if n_steps <= 0:
            raise ValueError(
                f"Expected argument `n_steps` to be positive but got {n_steps}: "
                "remove the callback if there is to be no warm-up."
            )
        self.n_steps = n_steps
        self._began: int | None = None

    def share(self, steps_taken: int) -> float:
        """Share of the penalty in force in the step after `steps_taken` steps of the warm-up.

        Example:
            >>> [L1Warmup(n_steps=4).share(taken) for taken in range(6)]
            [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        """
        return min(1.0, (steps_taken + 1) / self.n_steps)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; forget an earlier fit (resuming loads its state after this)."""
        if stage != "fit":
            return
        self._began = None
        if getattr(pl_module, "coefficient_name", None) is None:
            raise ValueError(
                "`L1Warmup` needs an SAE with a sparsity penalty but "
                f"{type(pl_module).__name__} has none: remove the callback."
            )
        if 0 < trainer.max_steps < self.n_steps and not trainer.fast_dev_run:  # type: ignore
            raise ValueError(
                "Expected argument `n_steps` to be at most "
                f"`trainer.max_steps`={trainer.max_steps} but got {self.n_steps}: "
                "shorten the warm-up or lengthen the run."
            )
        refuse_second(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the warm-up begins, unless a checkpoint said so."""
        if self._began is None:
            self._began = trainer.global_step

    @override
    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Float[Tensor, "batch d_in"],
        batch_idx: int,
    ) -> None:
        """Set the share for the step in progress."""
        assert self._began is not None
        # The number of optimiser steps taken so far, the same for all micro-batches of a step.
        share = self.share(trainer.global_step - self._began)
        cast(SparseAutoencoder, pl_module).penalty_scale = share
        pl_module.log("train/penalty_scale", share)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the whole penalty behind."""
        cast(SparseAutoencoder, pl_module).penalty_scale = 1.0

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the whole penalty behind."""
        cast(SparseAutoencoder, pl_module).penalty_scale = 1.0

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step at which the warm-up began."""
        return {"began": self._began}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the warm-up that the checkpoint was in."""
        self._began = state_dict["began"]
