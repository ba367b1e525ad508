"""Adjusts the sparsity penalty to reach a target L0."""

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.checks import expect, refuse_second, require_not_negative, require_positive

TOLERANCE = 0.05  # largest relative difference from the target without a warning


class TargetL0(Callback):
    r"""Change the penalty's coefficient a little in each step until L0 is at a target.

    With :math:`y_t` the log of L0 over its target, :math:`\bar y` its running mean, and n and h the
    lengths of smoothing and foresight, after each optimizer step

    .. math::
        \bar y_t &= \bar y_{t-1} + (y_t - \bar y_{t-1}) / n, \qquad
        \hat y = \bar y_t + h\, (\bar y_t - \bar y_{t-1}) \\
        c_{t+1} &= c_t\, (1 + r)^{\max(-1, \min(1, \hat y))}

    where c is the SAE's `penalty_factor`, which multiplies the coefficient, and r the largest
    change. So it reacts to the L0 expected h steps ahead if the trend continues, and does not
    counteract an L0 that is already falling, as at the start of training. L0 is the mean over all
    micro-batches and ranks of a step. While `L1Warmup` raises the penalty, only the mean is
    updated. The factor is logged as `train/penalty_factor`.

    A resumed fit continues where it was. Any other fit starts from the SAE's current factor. After
    the fit the SAE keeps the factor; its coefficient is multiplied by it.

    A fit warns if the mean L0 of its last steps differs from the target by more than 5 %.

    Example::

        trainer = Trainer(callbacks=[L1Warmup(1000), TargetL0(32)], max_steps=20_000)

    Args:
        target: Active latents per activation.
        max_change: The largest relative change of the coefficient in a step.
        smoothing_steps: Length n of the running mean, in optimizer steps.
        foresight_steps: Number of steps h.
        during_warmup: Whether to change the coefficient also while `L1Warmup` raises the penalty.

    Raises:
        ValueError: If an argument is out of range; when fitting starts, if the SAE has no sparsity
            penalty or its coefficient is 0, if `target` is not less than `d_sae`, or if the trainer
            has this callback twice.
    """

    def __init__(
        self,
        target: float,
        *,
        max_change: float = 0.01,
        smoothing_steps: int = 20,
        foresight_steps: int = 200,
        during_warmup: bool = False,
    ) -> None:
        require_positive(target=target, smoothing_steps=smoothing_steps)
        require_not_negative(foresight_steps=foresight_steps)
        expect(0 < max_change <= 0.1, "max_change", "above 0 and at most 0.1", max_change)
        self.target, self.max_change = target, max_change
        self.smoothing_steps, self.foresight_steps = smoothing_steps, foresight_steps
        self.during_warmup = during_warmup
        self._factor: float | None
        self._mean: float | None
        self._fired: int
        self._seen: int
        self._start_afresh()

    def step_of(self, mean: float, before: float) -> float:
        """The log of the factor's change, from the running mean and the one before.

        Example:
            >>> callback = TargetL0(32, max_change=0.01, foresight_steps=100)
            >>> f"{callback.step_of(3.0, 3.0):.4f}"  # far above
            '0.0100'
            >>> f"{callback.step_of(0.2, 0.201):.4f}"  # nearer, and half way there in 100 steps
            '0.0010'
        """
        expected = mean + self.foresight_steps * (mean - before)
        return math.log1p(self.max_change) * max(-1.0, min(1.0, expected))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the SAE and reset the state; a resume loads its state after this."""
        if stage != "fit":
            return
        self._start_afresh()
        name = getattr(pl_module, "coefficient_name", None)
        if name is None or getattr(pl_module, name) == 0:
            raise ValueError(
                "`TargetL0` needs an SAE with a sparsity penalty whose coefficient is not 0 but "
                f"{type(pl_module).__name__} has none: remove the callback, or choose another SAE "
                "or coefficient."
            )
        d_sae = cast(SparseAutoencoder, pl_module).d_sae
        expect(self.target < d_sae, "target", f"less than `d_sae`={d_sae}", self.target)
        refuse_second(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the factor of a checkpoint; remember the step of the first batch."""
        if self._factor is not None:
            cast(SparseAutoencoder, pl_module).penalty_factor = self._factor
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Float[Tensor, "batch d_in"],
        batch_idx: int,
    ) -> None:
        """Count the batch; after the last of a step, set the factor for the next step."""
        sae = cast(SparseAutoencoder, pl_module)
        fired = cast(dict[str, Tensor], outputs)["fired"].sum()
        counts = torch.stack([fired, fired.new_tensor(len(batch))])
        # The same on all ranks, so that they come to the same factor.
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        self._fired, self._seen = self._fired + int(counts[0]), self._seen + int(counts[1])
        if trainer.global_step > self._step:  # else gradients are being accumulated
            self._step = trainer.global_step
            self._steer(sae)
            self._fired = self._seen = 0
        pl_module.log("train/penalty_factor", sae.penalty_factor)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the target was not reached."""
        if self._mean is None or abs(math.expm1(self._mean)) <= TOLERANCE:
            return
        factor = cast(SparseAutoencoder, pl_module).penalty_factor
        rank_zero_warn(
            f"`TargetL0` did not reach its target: L0 is {self.target * math.exp(self._mean):.3g} "
            f"and not {self.target:g}, with the coefficient multiplied by {factor:.3g} and moved "
            f"by at most {self.max_change:.1%} a step. Train for longer, start with another "
            "coefficient, or raise `max_change`; if the factor is at work for long and L0 stays, "
            "the penalty is too slow, as with a low learning rate."
        )

    def _steer(self, sae: SparseAutoencoder) -> None:
        # If nothing fires, count one firing in the batch, so that the log is finite.
        error = math.log(max(self._fired, 1) / self._seen / self.target)
        before = error if self._mean is None else self._mean
        self._mean = before + (error - before) / self.smoothing_steps
        if sae.penalty_scale == 1 or self.during_warmup:
            sae.penalty_factor *= math.exp(self.step_of(self._mean, before))
        self._factor = sae.penalty_factor

    @override
    def state_dict(self) -> dict[str, Any]:
        """The factor, the running mean, and the counts of the current step."""
        return {
            "factor": self._factor,
            "mean": self._mean,
            "fired": self._fired,
            "seen": self._seen,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._factor, self._mean = state_dict["factor"], state_dict["mean"]
        self._fired, self._seen = state_dict["fired"], state_dict["seen"]

    def _start_afresh(self) -> None:
        self._factor = self._mean = None
        self._fired = self._seen = 0
