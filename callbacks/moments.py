"""Reset optimizer state for single latents."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def reset_moments(
    optimizers: Iterable[Optimizer], weight: Tensor, latents: Bool[Tensor, " d_sae"], axis: int
) -> None:
    """Set the moments of Adam and its variants to zero for some latents of `weight`.

    This resets all running averages (`exp_avg`, `exp_avg_sq`, ...), i.e. state entries with the
    weight's shape. The step count is shared by all latents and is kept.

    Args:
        optimizers: Optimizers that may hold the weight.
        weight: A parameter with one axis of latents.
        latents: Latents to reset.
        axis: The weight's axis of latents.
    """
    for optimizer in optimizers:
        for moment in optimizer.state.get(weight, {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment.movedim(axis, 0)[latents] = 0
