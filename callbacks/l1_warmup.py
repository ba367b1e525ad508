"""A sparsity penalty that comes into force gradually."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_sae.callbacks.schedule import ScheduledScale


class L1Warmup(ScheduledScale):
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

    scale = "penalty_scale"

    def __init__(self, n_steps: int) -> None:
        if n_steps <= 0:
            raise ValueError(
                f"Expected argument `n_steps` to be positive but got {n_steps}: "
                "remove the callback if there is to be no warm-up."
            )
        self.n_steps = n_steps

    @override
    def share(self, steps_taken: int) -> float:
        """Share of the penalty in force in the step after `steps_taken` steps of the warm-up.

        Example:
            >>> [L1Warmup(n_steps=4).share(taken) for taken in range(6)]
            [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        """
        return min(1.0, (steps_taken + 1) / self.n_steps)

    @override
    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
