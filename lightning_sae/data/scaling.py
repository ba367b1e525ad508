"""Centring and scaling of activations, estimated once, and a look at what would spoil them."""

import math
import warnings
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


FAR = 10
"""Multiple of the median norm from which on an activation counts as an outlier."""


def require_usable(rows: Float[Tensor, "rows d"], hook_name: str) -> None:
    """Warn of outliers that would decide what an SAE learns.

    Raises:
        ValueError: If all rows are zero.
    """
    # In parts, for all rows in float32 may be twice as much as the buffer.
    norms = torch.cat([part.float().norm(dim=-1) for part in rows.split(2**13)])
    usual = norms[norms.isfinite() & (norms > 0)]
    if not (norms != 0).any():
        raise ValueError(
            f"All of the first {len(rows)} activations at {hook_name} are zero: choose another "
            "hook, or look at the model."
        )
    if not len(usual):  # the first step says that none is finite
        return
    far = norms > FAR * usual.median()
    share = float(norms[far].square().sum() / norms.square().sum())
    if far.any() and not share < 0.5:
        rest = norms[~far]
        warnings.warn(
            f"{int(far.sum())} of the first {len(norms)} activations at {hook_name} are more than "
            f"{FAR} times as long as the median, up to {norms.max() / usual.median():.0f} times. "
            f"They have {share:.0%} of the sum of squares that an SAE fits, and the mean norm, by "
            f"which `scale` divides, is {norms.mean() / rest.mean():.2f} times that of the others. "
            f"`max_norm_multiple={FAR}` leaves them out.",
            stacklevel=2,
        )


def require_precision(rows: Float[Tensor, "rows d"], dtype: torch.dtype) -> None:
    """Warn if rows lose what tells them apart when they are stored in `dtype`.

    An offset that is large beside the variance takes up the digits of a short dtype.

    Raises:
        ValueError: If they are too large for it.
    """
    stored = rows.to(dtype)
    if stored.isinf().any() and rows.isfinite().all():
        raise ValueError(
            f"Expected argument `dtype` to hold activations up to {rows.abs().max():.3g} but "
            f"{dtype} ends at {torch.finfo(dtype).max:.3g}: set it to `float32` or `bfloat16`."
        )
    error, variance = (rows - stored).square().sum(), (rows - rows.mean(0)).square().sum()
    if error > 0.01 * variance:
        largest = int(rows.mean(0).abs().argmax())
        warnings.warn(
            f"Stored as {dtype}, activations lose {error / variance:.1%} of their variance to "
            f"rounding: coordinate {largest} is {rows[:, largest].mean():.3g} on average, beside "
            "which the digits of the variance are lost. Set `dtype` to `float32`.",
            stacklevel=2,
        )
