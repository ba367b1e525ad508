"""Evaluation of an objective, on a whole batch or on chunks of its rows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.squared_error import squared_errors


class Step(NamedTuple):
    """Result of an objective, on centred and scaled activations.

    Attributes:
        losses: Terms of the loss by name, each a scalar; training minimises their sum.
        f: Latents, as a code or a matrix [batch, d_sae].
        x_hat: Reconstruction.
        squared_error: Squared error of each row; computed from `x_hat` if it is None.
    """

    losses: dict[str, Float[Tensor, ""]]
    f: Code | Float[Tensor, "batch d_sae"]
    x_hat: Float[Tensor, "batch d_in"]
    squared_error: Float[Tensor, " batch"] | None = None


class Outcome(NamedTuple):
    """Result of an evaluation, for training.

    Attributes:
        loss: Sum of the terms, with its gradient.
        losses: The terms, detached.
        fired: How often each latent fired.
        squared_error: Squared error of each row, detached.
    """

    loss: Float[Tensor, ""]
    losses: dict[str, Float[Tensor, ""]]
    fired: Int[Tensor, " d_sae"]
    squared_error: Float[Tensor, " batch"]


Objective = Callable[[Tensor], Step]


def at_once(objective: Objective, x: Float[Tensor, "batch d_in"]) -> Outcome:
    """Evaluate the objective on a batch."""
    step = objective(x)
    with torch.no_grad():
        f = step.f if isinstance(step.f, Code) else Code.of_matrix(step.f)
        errors = step.squared_error
        errors = squared_errors(x, step.x_hat) if errors is None else errors.detach()
    loss = torch.stack(list(step.losses.values())).sum()
    losses = {name: value.detach() for name, value in step.losses.items()}
    return Outcome(loss, losses, f.firings(), errors)


def in_chunks(
    objective: Objective,
    x: Float[Tensor, "batch d_in"],
    rows: int,
    parameters: Sequence[Tensor],
) -> Outcome:
    """The same, chunk by chunk, for an objective that is a mean over rows.

    The gradient of each chunk is computed at once, so that its graph can be freed. `backward` then
    returns the sum.
    """
    gradients: list[Tensor | None] = [None] * len(parameters)
    outcomes, shares = [], []
    for chunk in x.split(rows):
        outcome = at_once(objective, chunk)
        share = len(chunk) / len(x)
        with torch.autocast(x.device.type, enabled=False):  # as `backward` runs, outside of it
            parts = torch.autograd.grad(share * outcome.loss, parameters, allow_unused=True)
        gradients = [_sum(*pair) for pair in zip(gradients, parts, strict=True)]
        outcomes.append(outcome._replace(loss=outcome.loss.detach()))
        shares.append(share)
    weighted = list(zip(shares, outcomes, strict=True))
    loss = torch.stack([share * outcome.loss for share, outcome in weighted]).sum()
    return Outcome(
        _WithGradients.apply(loss, gradients, *parameters),
        {
            name: torch.stack([share * outcome.losses[name] for share, outcome in weighted]).sum()
            for name in outcomes[0].losses
        },
        torch.stack([outcome.fired for outcome in outcomes]).sum(0),
        torch.cat([outcome.squared_error for outcome in outcomes]),
    )


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


class _WithGradients(Function):
    """A loss with given gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Drop the reference, or autograd would copy each gradient when it accumulates it.
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(dloss) for g in gradients)
