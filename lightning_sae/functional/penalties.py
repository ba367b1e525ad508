"""Sparsity penalties: summed over latents, averaged over the batch."""

from jaxtyping import Float
from torch import Tensor


def l1(
    f: Float[Tensor, "batch d_sae"], weights: Float[Tensor, " d_sae"] | None = None
) -> Float[Tensor, ""]:
    r"""Mean over the batch of :math:`\sum_j w_j |f_j|`, with weights 1 unless given.

    Example:
        >>> import torch
        >>> l1(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor(3.)
    """
    f = f.abs()
    return (f if weights is None else f * weights).sum(-1).mean()
