"""The optimiser's memory of single entries of a weight."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def reset_moments(
    optimizers: Iterable[Optimizer], weight: Tensor, latents: Bool[Tensor, " d_sae"], axis: int
) -> None:
    """Set to zero what Adam and its variants remember of `weight` at some latents.

    All running averages are meant, `exp_avg`, `exp_avg_sq` and the like: the entries of the state
    that have the weight's shape. The count of steps is shared by all latents and stays.

    Args:
        optimizers: Those that may hold the weight.
        weight: A parameter with one axis of latents.
        latents: Which ones to forget.
        axis: The weight's axis of latents.
    """
    for optimizer in optimizers:
        for moment in optimizer.state.get(weight, {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment.movedim(axis, 0)[latents] = 0
