"""Unit-norm directions, and gradients that preserve their norm."""

import torch
from jaxtyping import Float
from torch import Tensor


def unit_rows(w: Float[Tensor, "rows d"], eps: float = 1e-12) -> Float[Tensor, "rows d"]:
    """Scale each row to unit Euclidean norm; rows of zeros stay zero.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return w / torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_min(eps)


def random_unit_rows(
    rows: int, d: int, generator: torch.Generator | None = None
) -> Float[Tensor, "rows d"]:
    """Draw directions uniformly from the unit sphere."""
    return unit_rows(torch.randn(rows, d, generator=generator))


def without_parallel_part(
    gradient: Float[Tensor, "rows d"], w: Float[Tensor, "rows d"]
) -> Float[Tensor, "rows d"]:
    """Remove from each row of `gradient` its component along the same row of `w`.

    `w` must have unit rows. A step along the result changes their norm only to second order.

    Example:
        >>> w = torch.tensor([[1.0, 0.0]])
        >>> without_parallel_part(torch.tensor([[5.0, 2.0]]), w)
        tensor([[0., 2.]])
    """
    return gradient - (gradient * w).sum(-1, keepdim=True) * w
