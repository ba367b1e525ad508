"""Centring and scaling of activations, estimated once, and checks for outliers and rounding."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Scaling(NamedTuple):
    """Normalisation of activations: an SAE sees `(x - mean) * scale`.

    Attributes:
        mean: Mean to subtract, shape [d].
        scale: Factor applied after the subtraction.
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
        rows: Activations [n, d]; every rank passes its own, equally many.
        center: Whether the mean is subtracted.
        scale: Whether the result is scaled.
        mean_of_ranks: Computes the mean of a tensor over all ranks.

    Raises:
        ValueError: If rows are not finite or all equal.

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
"""Multiple of the median norm above which an activation counts as an outlier."""


def require_usable(rows: Float[Tensor, "rows d"], hook_name: str) -> None:
    """Warn of outliers large enough to dominate training.

    Raises:
        ValueError: If all rows are zero.
    """
    # In chunks, because all rows in float32 may need twice the memory of the buffer.
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
    """Warn if rounding to `dtype` loses much of the rows' variance.

    A coordinate whose mean is large compared to its variance uses up the digits of a short dtype.

    Raises:
        ValueError: If values are too large for it.
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
