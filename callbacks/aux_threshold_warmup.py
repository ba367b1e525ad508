"""Delay and linear warm-up of the auxiliary orthogonality loss."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_sae.architectures.orthogonality import WithOrthogonality
from lightning_sae.callbacks.schedule import ScheduledScale
from lightning_sae.training.lengths import Length, require_lengths, two_steps_of, unknown


class AuxThresholdWarmup(ScheduledScale):
    """Delay the auxiliary orthogonality loss, then raise its weight and threshold linearly.

    The scale at the k-th step of a fit, counted from 1, is 0 up to step `delay_steps`, and then
    min(1, (k - `delay_steps`) / `warmup_steps`). It multiplies both the coefficient and the
    threshold of `WithOrthogonality`, through the SAE's `orthogonality_scale`, logged as
    `train/orthogonality_scale`. Largest activations are tracked from the first step on.
    Micro-batches of a step share one value. A resumed fit continues the schedule; any other fit
    restarts it. After the fit the scale is 1.

    Source: Chanin et al., Broken latents (2024), with a third of the run for each of delay,
    warm-up and the rest.

    Example::

        sae = TiedSAE(d_in=50, d_sae=5, l1_coefficient=1e-3, orthogonality_coefficient=1e4)
        trainer = Trainer(callbacks=AuxThresholdWarmup(1 / 3, 1 / 3), max_steps=19_500)

    Args:
        delay_steps: Optimizer steps without the loss, or a share of `trainer.max_steps` between 0
            and 1.
        warmup_steps: Further steps until it has its full weight, or a share.

    Raises:
        ValueError: If an argument is out of range; when fitting starts, if both are longer than
            the run or one is a share of a run of unknown length, if the SAE has no such loss, or
            if the trainer has this callback twice.
    """

    scale = "orthogonality_scale"
    length_names = ("delay_steps", "warmup_steps")

    def __init__(self, delay_steps: Length, warmup_steps: Length) -> None:
        require_lengths(0, delay_steps=delay_steps)
        require_lengths(1, warmup_steps=warmup_steps)
        self.delay_steps, self.warmup_steps = delay_steps, warmup_steps

    @override
    def share(self, steps_taken: int) -> float:
        """Scale of the loss in the step after `steps_taken` steps of the fit.

        Example:
            >>> [AuxThresholdWarmup(2, 4).share(taken) for taken in range(8)]
            [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        """
        delay, warmup = self._in_steps(self._total)
        return min(1.0, max(0.0, (steps_taken + 1 - delay) / max(1, warmup)))

    @override
    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, WithOrthogonality) or pl_module.peaks is None:
            raise ValueError(
                "`AuxThresholdWarmup` needs an SAE with an auxiliary loss of orthogonality but "
                f"{type(pl_module).__name__} has none: set its `orthogonality_coefficient`, or "
                "remove the callback."
            )

    @override
    def length_problems(self, total: int) -> list[str]:
        """Error messages about delay and warm-up in a run of `trainer.max_steps`."""
        if total <= 0:
            return unknown(total, delay_steps=self.delay_steps, warmup_steps=self.warmup_steps)
        delay, warmup = self._in_steps(total)
        if delay + warmup > total:
            return [
                "Expected `delay_steps` + `warmup_steps` to be at most `trainer.max_steps`="
                f"{total} but got {delay} + {warmup}: shorten one of them, give shares of the run, "
                "as 0.3, or lengthen the run."
            ]
        return []

    def _in_steps(self, total: int) -> tuple[int, int]:
        return two_steps_of(self.delay_steps, self.warmup_steps, total, self.length_names)
