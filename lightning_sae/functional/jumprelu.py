r"""The jump ReLU and the step, with pseudo-derivatives with respect to the threshold.

With :math:`K(u) = [|u| < 1/2]`, a rectangle, and bandwidth :math:`\epsilon`:

.. math::
    \mathrm{JumpReLU}_\theta(v) &= v\,[v > \theta], &
    \partial_\theta &\approx -\tfrac{\theta}{\epsilon} K(\tfrac{v - \theta}{\epsilon}) \\
    H_\theta(v) &= [v > \theta], &
    \partial_\theta &\approx -\tfrac{1}{\epsilon} K(\tfrac{v - \theta}{\epsilon})

Both are nonzero only on the active set and in the window around the threshold: a code of all
entries above :math:`\theta - \epsilon/2` is enough. Source: Rajamanoharan et al., Jumping ahead
(2024), eqs. 10 to 12.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def jumprelu(
    v: Float[Tensor, "..."], theta: Float[Tensor, "..."], bandwidth: float | Float[Tensor, ""]
) -> Float[Tensor, "..."]:
    """`v` where it is above `theta`, else 0.

    Args:
        v: Pre-activations.
        theta: Thresholds, in a shape that broadcasts to that of `v`.
        bandwidth: Width of the window in which `theta` gets a gradient.
    """
    return _JumpReLU.apply(v, theta.expand_as(v), bandwidth)


def step(
    v: Float[Tensor, "..."], theta: Float[Tensor, "..."], bandwidth: float | Float[Tensor, ""]
) -> Float[Tensor, "..."]:
    """1 where `v` is above `theta`, else 0; `v` itself gets no gradient. See `jumprelu`."""
    return _Step.apply(v, theta.expand_as(v), bandwidth)


def _in_window(v: Tensor, theta: Tensor, bandwidth: float | Tensor) -> Tensor:
    return ((v - theta).abs() < bandwidth / 2).to(v.dtype)


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, theta: Tensor, bandwidth: float | Tensor) -> Tensor:
        ctx.save_for_backward(v, theta)
        ctx.bandwidth = bandwidth
        return v * (v > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor | None, ...]:
        v, theta = ctx.saved_tensors
        dtheta = -theta / ctx.bandwidth * _in_window(v, theta, ctx.bandwidth) * df
        return df * (v > theta), dtheta, None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, theta: Tensor, bandwidth: float | Tensor) -> Tensor:
        ctx.save_for_backward(v, theta)
        ctx.bandwidth = bandwidth
        return (v > theta).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        v, theta = ctx.saved_tensors
        return None, -1 / ctx.bandwidth * _in_window(v, theta, ctx.bandwidth) * dh, None
