"""Fused Adam with warm-up and decay of the learning rate, gradient clipping, step hooks."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_sae.checks import require_betas, require_positive
from lightning_sae.functional.waiting import waiting_is_slow
from lightning_sae.training.lengths import (
    Length,
    require_lengths,
    steps_of,
    two_steps_of,
    unknown,
)

NAMES = "lr_warmup_steps", "lr_decay_steps"

Decay = Length | Literal["auto"]
"""Length of the decay; `auto` is `AUTO_DECAY`, or none in a run of unknown length."""

AUTO_DECAY = 0.25


def peak_rate(d_sae: int) -> float:
    """Peak learning rate by the number of latents, where none is given.

    It falls as the root of that number, for each latent then sees fewer inputs, and is at most
    .008. The root is that of Gao et al., Scaling and evaluating sparse autoencoders (2024), whose
    rate is a fifth of this one, in far longer runs; a lower `lr` may be better there. Higher rates
    lower FVU further in short runs, but more latents die. `docs/settings.md` has figures.

    Example:
        >>> [round(peak_rate(d_sae), 5) for d_sae in (64, 1024, 16384)]
        [0.008, 0.004, 0.001]
    """
    return min(8e-3, 4e-3 * math.sqrt(1024 / d_sae))


def warmup_stable_decay(step: int, warmup: int, decay: int, total: int) -> float:
    """Factor of the peak learning rate at an optimizer step counted from 0.

    Rises linearly over the first `warmup` steps, falls linearly to zero over the last `decay` of
    `total`, and is 1 between.

    Example:
        >>> [round(warmup_stable_decay(s, warmup=2, decay=2, total=6), 2) for s in range(6)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (total - step) / decay if decay and step > total - decay else 1.0
    return max(0.0, min(rise, fall))


def require_rates(lr: float, betas: tuple[float, float], warmup: Length, decay: Decay) -> None:
    """Raise a ValueError if an argument of the optimizer or of its schedule is out of range."""
    require_positive(lr=lr)
    require_betas(betas)
    require_lengths(0, lr_warmup_steps=warmup)
    if decay != "auto":
        require_lengths(0, lr_decay_steps=decay)


def schedule_steps(warmup: Length, decay: Decay, total: int) -> tuple[int, int]:
    """Optimizer steps of warm-up and decay in a run of `total` (-1: unknown length).

    Example:
        >>> schedule_steps(0, "auto", 100), schedule_steps(0.9, "auto", 100)
        ((0, 25), (90, 10))
        >>> schedule_steps(5, "auto", -1)
        (5, 0)
    """
    if decay != "auto":
        return two_steps_of(warmup, decay, total, NAMES)
    rise = steps_of(warmup, total, NAMES[0])
    return rise, max(0, min(round(AUTO_DECAY * total), total - rise))


def schedule_problems(warmup: Length, decay: Decay, total: int) -> list[str]:
    """Error messages about a schedule in a run of `total` steps (-1: unknown length)."""
    if decay == "auto":
        return unknown(total, lr_warmup_steps=warmup)
    problems = unknown(total, lr_warmup_steps=warmup, lr_decay_steps=decay)
    if problems or not decay:
        return problems
    if total <= 0:
        return [
            f"`lr_decay_steps`={decay} needs a run of known length, but `trainer.max_steps` is "
            f"{total}: set `trainer.max_steps`, or set `lr_decay_steps` to 0."
        ]
    rise, fall = two_steps_of(warmup, decay, total, NAMES)
    if rise + fall > total:
        return [
            f"Expected `lr_warmup_steps` + `lr_decay_steps` to be at most `trainer.max_steps`="
            f"{total} but got {rise} + {fall}: shorten one of them, or give shares of the run, as "
            "0.1."
        ]
    return []


def adam_with_schedule(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    warmup: Length,
    decay: Decay,
    total: int,
    fused: bool = True,
) -> OptimizerLRSchedulerConfig:
    """Adam without weight decay, with a schedule that is stepped once per optimizer step.

    Raises:
        ValueError: If the length of the run is needed but unknown, or if warm-up and decay do not
            fit into the run.
    """
    for problem in schedule_problems(warmup, decay, total):
        raise ValueError(problem)
    rise, fall = schedule_steps(warmup, decay, total)
    optimizer = MemoryOrderAdam(parameters, lr=lr, betas=betas, fused=fused)
    share = partial(warmup_stable_decay, warmup=rise, decay=fall, total=total)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": Schedule(optimizer, share), "interval": "step"},
    }


def set_peak_rates(schedule: Any, rates: list[float]) -> None:
    """Change the peak learning rates, one per group, of a schedule of `adam_with_schedule`."""
    if not isinstance(schedule, LambdaLR) or schedule.base_lrs == rates:
        return
    schedule.base_lrs = list(rates)
    groups = schedule.optimizer.param_groups
    for group, rate, share in zip(groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * share(schedule.last_epoch)


class Schedule(LambdaLR):
    """A schedule that on resume keeps its own peak learning rates, not the checkpoint's."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = given
        self._last_lr = [
            peak * share(self.last_epoch)
            for peak, share in zip(given, self.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class MemoryOrderAdam(Adam):
    """Adam that passes transposed weights in memory order; torch's fused step would copy them.

    On resume it takes the moments of a checkpoint but keeps its own learning rates.
    """

    grad_scale: Tensor | None = None  # the next fused step divides gradients by it

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, given, strict=True):
            group.update(own)

    @override
    def _init_group(self, group: Any, *lists: Any) -> bool:
        found = super()._init_group(group, *lists)
        weights, gradients, averages, squares = lists[:4]
        for tensors in (weights, gradients, averages, squares):
            tensors[:] = [in_memory_order(tensor) for tensor in tensors]
        return found


def in_memory_order(tensor: Tensor) -> Tensor:
    """A matrix, or its transpose if that is contiguous."""
    return tensor if tensor.is_contiguous() else tensor.mT


@torch.no_grad()
def clip_norm(optimizer: Optimizer, max_norm: float, norm: Float[Tensor, ""] | None = None) -> None:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`.

    A fused optimizer does it in its next step, which saves a pass over the gradients.

    Args:
        optimizer: Holds the weights.
        max_norm: The largest norm.
        norm: The joint norm, where some of the gradients are on other devices.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [in_memory_order(weight.grad) for weight in weights if weight.grad is not None]
    if not gradients:
        return
    norm = nn.utils.get_total_norm(gradients) if norm is None else norm
    excess = (norm / max_norm).clamp_min(1.0)
    if isinstance(optimizer, MemoryOrderAdam) and optimizer.defaults["fused"]:
        # Comparing is free on a CPU, but a GPU would have to synchronise.
        # The kernels need float32, whatever the dtype of the weights.
        slow = waiting_is_slow(excess.device)
        optimizer.grad_scale = excess.float() if slow or excess > 1 else None
    else:
        torch._foreach_div_(gradients, excess)


def clip_gradients(
    optimizer: Optimizer,
    value: float | None,
    algorithm: str | None,
    norm: Float[Tensor, ""] | None = None,
) -> None:
    """Clip all gradients by their joint norm or, with the algorithm `value`, each entry.

    A value of 0 or None does not clip. For `norm` see `clip_norm`.
    """
    if not value:
        return
    if algorithm == "value":
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_value_(weights, value)
    else:
        clip_norm(optimizer, value, norm)


class AfterOptimizerSteps(Callback):
    """A callback that changes weights directly after each optimizer step, until training ends.

    It uses hooks of the optimizer, because Lightning calls nothing between a step and what follows.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def after_each_step(self, trainer: Trainer, weight: Tensor, act: Callable[[], None]) -> None:
        """Call `act` after each step of the optimizer that trains `weight`."""
        self._handles += [
            optimizer.register_step_post_hook(lambda *_: act())
            for optimizer in trainer.optimizers
            if any(weight is p for group in optimizer.param_groups for p in group["params"])
        ]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the optimizer hooks."""
        self._remove_hooks()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the optimizer hooks."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
