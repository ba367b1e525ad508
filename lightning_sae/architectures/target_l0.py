"""Adjusts the sparsity penalty to reach a target L0."""

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import Protocol, override, runtime_checkable

from lightning_sae.checks import expect, refuse_second, require_not_negative, require_positive
from lightning_sae.distributed.parts import Parts
from lightning_sae.distributed.split import copies_of

ARRIVED = 0.8  # share of a run after which L0 should be at its target
GAIN = 3.0  # the largest increase is used where log L0 should fall by a third or more
BELOW = 15.0  # in a run of known length, further gain where L0 is below its target,
LITTLE = 0.05  # of a log L0 that is this much below it at most
FALL = 5.0  # how much faster the coefficient may decrease than increase
TOLERANCE = 0.05  # largest relative difference from the target without a warning


@runtime_checkable
class Steered(Protocol):
    """An SAE that may have a penalty; `SparseAutoencoder` is one.

    Attributes:
        d_sae: Number of latents.
        coefficient_name: Name of the attribute with the penalty's coefficient; None without a
            penalty.
        penalty_scale: Share of the penalty during a warm-up; 1 after it.
        penalty_factor: Factor of the penalty's coefficient.
        parts: The devices that share its latents.
    """

    d_sae: int
    coefficient_name: str | None
    penalty_scale: float
    penalty_factor: float
    parts: Parts


def _has_penalty(sae: Steered) -> bool:
    return sae.coefficient_name is not None and getattr(sae, sae.coefficient_name) != 0


def warn_of_held_out(who: str, target: float, trainer: Trainer, validated_at: int) -> None:
    """Warn if L0 on held-out activations differs from the target by more than `TOLERANCE`.

    Does nothing unless the last optimizer step was validated.

    Args:
        who: Name of the callback or class in the message.
        target: Active latents per activation.
        trainer: The trainer, with the metrics of the last validation.
        validated_at: Optimizer step of the last validation.
    """
    l0 = trainer.callback_metrics.get("val/l0")
    if l0 is None or validated_at != trainer.global_step:
        return
    if abs(float(l0) / target - 1) > TOLERANCE:
        rank_zero_warn(
            f"{who} reached its target of {target:g} in training, but on held-out activations L0 "
            f"is {float(l0):.3g}: their text is not like the text of training. Train on more of "
            "it, or give another target if L0 there is what matters."
        )


class TargetL0(Callback):
    r"""Change the penalty's coefficient a little in each step until L0 is at a target.

    With :math:`y_t` the log of L0 over its target, :math:`\bar y` its running mean, and n and h the
    lengths of smoothing and foresight, after each optimizer step

    .. math::
        \bar y_t &= \bar y_{t-1} + (y_t - \bar y_{t-1}) / n, \qquad
        \hat y = \bar y_t + h\, (\bar y_t - \bar y_{t-1}) \\
        c_{t+1} &= c_t\, (1 + r)^{\max(-5, \min(1, 3 \hat y - 15\, \bar y^-))}, \quad
        \bar y^- = \min(.05, \max(0, -\bar y))

    where c is the SAE's `penalty_factor`, which multiplies the coefficient, and r the largest
    increase. So it reacts to the L0 expected h steps ahead if the trend continues, and does not
    counteract an L0 that is already falling, as at the start of training. It lowers c faster than
    it raises it, because silent latents come back slowly. The term with 15 is there because L0
    keeps falling while c stays: without it L0 of a ReLU SAE ended 7 % below a target of 16 after
    500 steps, and with it 2 %. It is left out in runs of unknown length. L0 is the mean over all
    micro-batches and ranks of a step. While `L1Warmup` raises the penalty, only the mean is
    updated. The factor is logged as `train/penalty_factor`.

    L0 approaches the target as :math:`e^{-t/h}`, so h has to be short at the end of a run. In a run
    of T steps it is half of the steps left until 0.8 T, but at least T / 25 (within 20 and 100) and
    at most `foresight_steps`. The mean is over at most T / 50 steps, or 5 if that is less.

    In runs of 500 steps of 512 activations on two language models, L0 of ReLU, gated and tied SAEs
    of 512 and 1024 latents ended within 5 % of the target, see `docs/settings.md`.

    A resumed fit continues where it was. Any other fit starts from the SAE's current factor. After
    the fit the SAE keeps the factor; its coefficient is multiplied by it.

    A fit warns if the mean L0 of its last steps differs from the target by more than 5 %, or if L0
    on held-out activations does, where the last step is validated.

    Example::

        trainer = Trainer(callbacks=[L1Warmup(1000), TargetL0(32)], max_steps=20_000)

    Args:
        target: Active latents per activation.
        max_change: The largest relative increase r of the coefficient in a step. It decreases by up
            to five times as much.
        smoothing_steps: Largest length n of the running mean, in optimizer steps.
        foresight_steps: Largest number of steps h.
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
        self._validated_at: int
        self._start_afresh()

    def foresight(self, step: int, total: int) -> float:
        """Number of steps h after `step` of `total` steps; `total` <= 0 if it is unknown.

        Example:
            >>> [TargetL0(32).foresight(step, total=1000) for step in (0, 500, 700, 900)]
            [200, 150.0, 50.0, 40.0]
        """
        if total <= 0:
            return self.foresight_steps
        left = (ARRIVED * total - step) / 2
        return min(self.foresight_steps, max(left, min(total / 25, 100), 20))

    def step_of(self, mean: float, before: float, foresight: float, total: int = -1) -> float:
        """The log of the factor's change, from the running mean and the one before.

        In a run of `total` steps, if that is known, it lowers the factor more.

        Example:
            >>> callback = TargetL0(32, max_change=0.01)
            >>> f"{callback.step_of(3.0, 3.0, 100):.4f}"  # far above
            '0.0100'
            >>> f"{callback.step_of(0.2, 0.201, 100):.4f}"  # nearer, and half way in 100 steps
            '0.0030'
        """
        expected = mean + foresight * (mean - before)
        change = GAIN * expected
        if total > 0:
            change += BELOW * max(-LITTLE, min(0.0, mean))
        return math.log1p(self.max_change) * max(-FALL, min(1.0, change))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the SAE and reset the state; a resume loads its state after this."""
        if stage != "fit":
            return
        self._start_afresh()
        if not isinstance(pl_module, Steered) or not _has_penalty(pl_module):
            raise ValueError(
                "`TargetL0` needs an SAE with a sparsity penalty whose coefficient is not 0 but "
                f"{type(pl_module).__name__} has none: remove the callback, or choose another SAE "
                "or coefficient."
            )
        d_sae = pl_module.d_sae
        expect(self.target < d_sae, "target", f"less than `d_sae`={d_sae}", self.target)
        refuse_second(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the factor of a checkpoint; remember the step of the first batch."""
        if self._factor is not None:
            cast(Steered, pl_module).penalty_factor = self._factor
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Float[Tensor, "batch d_in"] | None,
        batch_idx: int,
    ) -> None:
        """Count the batch; after the last of a step, set the factor for the next step."""
        if batch is None:  # which Lightning skips
            return
        sae = cast(Steered, pl_module)
        fired = sae.parts.sum(cast(dict[str, Tensor], outputs)["fired"].sum())
        counts = torch.stack([fired, fired.new_full((), len(batch))])
        # The same on all ranks, so that they come to the same factor.
        counts = trainer.strategy.reduce(counts, copies_of(trainer).group, reduce_op="sum")
        on_all, rows = counts.tolist()
        self._fired, self._seen = self._fired + int(on_all), self._seen + int(rows)
        if trainer.global_step > self._step:  # else gradients are being accumulated
            self._step = trainer.global_step
            self._steer(sae, trainer.global_step, trainer.max_steps)
            self._fired = self._seen = 0
        pl_module.log("train/penalty_factor", sae.penalty_factor)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step of the held-out metrics."""
        self._validated_at = trainer.global_step

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the target was not reached, in training or on held-out activations."""
        if self._mean is None:
            return
        if abs(math.expm1(self._mean)) <= TOLERANCE:
            warn_of_held_out("`TargetL0`", self.target, trainer, self._validated_at)
            return
        factor = cast(Steered, pl_module).penalty_factor
        rank_zero_warn(
            f"`TargetL0` did not reach its target: L0 is {self.target * math.exp(self._mean):.3g} "
            f"and not {self.target:g}, with the coefficient multiplied by {factor:.3g} and moved "
            f"by at most {self.max_change:.1%} a step. Train for longer, start with another "
            "coefficient, or raise `max_change`; if the factor is at work for long and L0 stays, "
            "the penalty is too slow, as with a low learning rate."
        )

    def _steer(self, sae: Steered, step: int, total: int) -> None:
        # If nothing fires, count one firing in the batch, so that the log is finite.
        error = math.log(max(self._fired, 1) / self._seen / self.target)
        before = error if self._mean is None else self._mean
        length = self.smoothing_steps if total <= 0 else max(5, total / 50)
        self._mean = before + (error - before) / min(self.smoothing_steps, length)
        if sae.penalty_scale == 1 or self.during_warmup:
            foresight = self.foresight(step, total)
            sae.penalty_factor *= math.exp(self.step_of(self._mean, before, foresight, total))
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
        self._validated_at = -1
