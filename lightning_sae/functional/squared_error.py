"""The squared error that training minimizes, with few passes over the batch."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def squared_errors(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]
) -> Float[Tensor, " batch"]:
    r"""Squared error of each row, :math:`\|x - \hat x\|^2`, in the precision of `x`.

    The difference is computed once for value and gradient. As a metric use
    `lightning_sae.functional.mse`, which sums in float64.

    Example:
        >>> squared_errors(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2))
        tensor([5., 0.])
    """
    return _SquaredErrors.apply(x, x_hat)


class _SquaredErrors(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        difference = x_hat - x
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference, dim=-1).square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, derrors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (difference,) = ctx.saved_tensors
        dx_hat = difference * (2 * derrors).unsqueeze(-1)
        return -dx_hat if ctx.needs_input_grad[0] else None, dx_hat
