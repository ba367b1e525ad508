"""Adam in one fused pass, and a learning rate that rises, stays and falls."""

from collections.abc import Iterable
from functools import partial

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR


def warmup_stable_decay(step: int, warmup: int, decay: int, total: int) -> float:
    """Share of the peak learning rate at an optimiser step counted from 0.

    Rises linearly over the first `warmup` steps, falls linearly to zero over the last `decay` of
    `total`, and is 1 between.

    Example:
        >>> [round(warmup_stable_decay(s, warmup=2, decay=2, total=6), 2) for s in range(6)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (total - step) / decay if decay and step > total - decay else 1.0
    return max(0.0, min(rise, fall))


def adam_with_schedule(
    parameters: Iterable[Tensor],
    lr: float,
    betas: tuple[float, float],
    warmup: int,
    decay: int,
    total: int,
    fused: bool = True,
) -> OptimizerLRSchedulerConfig:
    """Adam without weight decay, its schedule stepped once per optimiser step.

    Raises:
        ValueError: If a decay is asked for while the length of the run is unknown, or if
            warm-up and decay do not fit into the run.
    """
    if decay and total <= 0:
        raise ValueError(
            f"`lr_decay_steps`={decay} needs a run of known length, but `trainer.max_steps` is "
            f"{total}: set `trainer.max_steps`, or set `lr_decay_steps` to 0."
        )
    if decay and warmup + decay > total:
        raise ValueError(
            f"Expected `lr_warmup_steps` + `lr_decay_steps` to be at most `trainer.max_steps`="
            f"{total} but got {warmup} + {decay}: shorten one of them."
        )
    optimizer = Adam(parameters, lr=lr, betas=betas, fused=fused)
    share = partial(warmup_stable_decay, warmup=warmup, decay=decay, total=total)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"},
    }
