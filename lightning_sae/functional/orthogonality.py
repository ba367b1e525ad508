r"""Penalty on the overlap of latents with the inputs on which they fire weakly.

.. math::
    L = \tfrac{1}{B F} \sum_{i,j} [f_{ij} \le \tau_j] \cos(x_i, W_j)^2

A latent that has absorbed part of another feature fires weakly where that feature occurs alone.
Making it orthogonal to such inputs removes that part. Source: Chanin et al., Broken latents:
studying SAEs and feature co-occurrence in toy models (2024).

The sum does not need the matrix of all pairs. With unit rows :math:`\hat X` and
:math:`\hat W`, and S the pairs with :math:`f > \tau`, which are all active:

.. math::
    \sum_{(i,j) \notin S} \cos^2
    = \sum_{kl} (\hat X^T \hat X)_{kl} (\hat W^T \hat W)_{kl}
    - \sum_{(i,j) \in S} \Big(\frac{x_i \cdot W_j}{\|x_i\| \|W_j\|}\Big)^2

where the products on S are known from encoding. The identity and its gradients are exact.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sae.functional.geometry import unit_rows
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.patterns import DensePattern

Side = Literal["low", "high"]

_LEAST = 1e-12  # smallest norm to divide by, as in `unit_rows`


def orthogonality(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    products: Code,
    strong: Bool[Tensor, "..."],
    side: Side = "low",
) -> Float[Tensor, ""]:
    """Mean squared cosine of inputs and encoder directions on one side of a threshold.

    Args:
        x: Encoder input, with b_dec subtracted. Zero rows count as orthogonal to everything.
        W_enc: Encoder.
        products: `x @ W_enc`, without a bias, at least on the active entries.
        strong: Where latents fire above their threshold, in the shape of `products.values`.
        side: `high` for the strong pairs; `low` for all others, silent ones included.

    Returns:
        The sum of the squared cosines on that side divided by the number of all pairs, batch *
        d_sae. From 0 to 1.

    Example:
        >>> x, W = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> products = Code.of_matrix(x @ W)
        >>> orthogonality(x, W, products, strong=torch.tensor([[False, True]]))
        tensor(0.1800)
    """
    batch, d_sae = products.shape
    with torch.autocast(x.device.type, enabled=False):  # a difference of large sums
        if side == "low" and _matrix_is_cheaper(products, x.shape[1]):
            cosines = unit_rows(x) @ unit_rows(W_enc.T).T
            return torch.where(strong, 0.0, cosines.square()).sum() / (batch * d_sae)
        total = _of_strong(x, W_enc, products, strong)
        if side == "low":
            total = _of_all(x, W_enc) - total
        return total / (batch * d_sae)


def _of_all(x: Tensor, W_enc: Tensor) -> Float[Tensor, ""]:
    inputs, directions = unit_rows(x), unit_rows(W_enc.T)
    return ((inputs.T @ inputs) * (directions.T @ directions)).sum()


def _of_strong(x: Tensor, W_enc: Tensor, products: Code, strong: Tensor) -> Float[Tensor, ""]:
    norms = torch.linalg.vector_norm(W_enc, dim=0).clamp_min(_LEAST)
    shares = torch.where(strong, products.values / products.at(norms), 0.0)
    squares = products.with_values(shares.square()).row_sums()
    return (squares / x.square().sum(-1).clamp_min(_LEAST**2)).sum()


def _matrix_is_cheaper(products: Code, d_in: int) -> bool:
    """Whether B F d operations are fewer than (B + F) d^2, for codes that are dense anyway."""
    batch, d_sae = products.shape
    dense = isinstance(products.pattern, DensePattern)
    return dense and batch * d_sae < (batch + d_sae) * d_in
