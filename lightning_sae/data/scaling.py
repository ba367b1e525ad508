"""Centring and scaling of activations, estimated once."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Scaling(NamedTuple):
    """How an SAE sees an activation: `(x - mean) * scale`.

    Attributes:
        mean: What is subtracted, [d].
        scale: What the rest is multiplied with.
    """

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, ""]


def estimate_scaling(
    rows: Float[Tensor, "rows d"],
    center: bool,
    scale: bool,
    mean_of_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> Scaling:
    """Subtract the mean row, then scale rows to mean norm sqrt(d); each only if asked for.

    Args:
        rows: Activations; of several ranks each has as many of its own.
        center: Whether the mean is subtracted.
        scale: Whether the rest is scaled.
        mean_of_ranks: The mean of a tensor over all ranks.

    Raises:
        ValueError: If rows are not finite or all alike.

    Example:
        >>> estimate_scaling(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), center=False, scale=True).scale
        tensor(0.2828)
    """
    rows = rows.float()
    mean = mean_of_ranks(rows.mean(0)) if center else torch.zeros(rows.shape[1])
    root = torch.tensor(math.sqrt(rows.shape[1]))
    norm = mean_of_ranks((rows - mean).norm(dim=-1).mean()) if scale else root
    if not (torch.isfinite(norm) and torch.isfinite(mean).all() and norm > 0):
        raise ValueError(
            f"The activations cannot be scaled: their mean norm is {norm.item()}. Look at the "
            "model and its dtype, or set `center` and `scale` to false."
        )
    return Scaling(mean, root / norm)
