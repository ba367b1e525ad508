"""Convert thresholds between `>` and `>=` and between dtypes, so that the same latents fire."""

import torch
from jaxtyping import Float
from torch import Tensor


def just_above(threshold: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The smallest number of a dtype above a threshold: `x >= result` equals `x > threshold`.

    Example:
        >>> just_above(torch.tensor(1.0), torch.bfloat16).item()
        1.0078125
    """
    exact = threshold.double()
    near = exact.to(dtype)
    return torch.where(near > exact, near, torch.nextafter(near, _far(near, torch.inf)))


def just_below(threshold: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The largest number of a dtype below a threshold: `x > result` equals `x >= threshold`.

    Example:
        >>> just_below(torch.tensor(1.0), torch.bfloat16).item()
        0.99609375
    """
    exact = threshold.double()
    near = exact.to(dtype)
    return torch.where(near < exact, near, torch.nextafter(near, _far(near, -torch.inf)))


def rounded_down(threshold: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The largest number of a dtype that is at most a threshold.

    Among numbers of that dtype, the same are above it as above the threshold.

    Example:
        >>> rounded_down(torch.tensor(1.007), torch.bfloat16).item()
        1.0
    """
    near = threshold.to(dtype)
    return torch.where(near.double() <= threshold.double(), near, just_below(threshold, dtype))


def _far(values: Float[Tensor, "..."], limit: float) -> Float[Tensor, "..."]:
    return torch.full_like(values, limit)
