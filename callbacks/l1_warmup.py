"""Linear warm-up of the sparsity penalty."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.callbacks.schedule import ScheduledScale
from lightning_sae.training.lengths import Length, require_lengths, steps_of, unknown


class L1Warmup(ScheduledScale):
    """Raise the sparsity penalty linearly from zero over the first optimizer steps.

    At the k-th step of a fit, counted from 1, the coefficient of the penalty, L1 or another, is
    multiplied by min(1, k / `n_steps`), through the SAE's `penalty_scale`, logged as
    `train/penalty_scale`. Micro-batches of a step share one value. A resumed fit continues the
    warm-up; any other fit starts a new one. After the fit the scale is 1.

    Example::

        trainer = Trainer(callbacks=L1Warmup(n_steps=0.05), max_steps=20_000)  # 1000 steps

    Args:
        n_steps: Optimizer steps until the penalty has its full weight, or a share of
            `trainer.max_steps` between 0 and 1.

    Raises:
        ValueError: If `n_steps` is not positive; when fitting starts, if it is longer than the
            run or a share of a run of unknown length, if the SAE has no penalty, or if the trainer
            has this callback twice.
    """

    scale = "penalty_scale"
    length_names = ("n_steps",)

    def __init__(self, n_steps: Length) -> None:
        require_lengths(1, n_steps=n_steps)
        self.n_steps = n_steps

    @override
    def share(self, steps_taken: int) -> float:
        """Scale of the penalty in the step after `steps_taken` steps of the warm-up.

        Example:
            >>> [L1Warmup(n_steps=4).share(taken) for taken in range(6)]
            [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        """
        return min(1.0, (steps_taken + 1) / steps_of(self.n_steps, self._total, "n_steps"))

    @override
    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, SparseAutoencoder) or pl_module.coefficient_name is None:
            raise ValueError(
                "`L1Warmup` needs an SAE with a sparsity penalty but "
                f"{type(pl_module).__name__} has none: remove the callback."
            )

    @override
    def length_problems(self, total: int) -> list[str]:
        """Error messages about `n_steps` in a run of `trainer.max_steps`."""
        if 0 < total < self.n_steps:
            return [
                f"Expected argument `n_steps` to be at most `trainer.max_steps`={total} but got "
                f"{self.n_steps}: shorten the warm-up, give a share of the run, as 0.1, or "
                "lengthen the run."
            ]
        return unknown(total, n_steps=self.n_steps)
