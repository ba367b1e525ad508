"""Checks that a run can be trained on its activations, and that loss and weights stay finite."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.functional.waiting import Copied, waiting_is_slow
from lightning_sae.tensors import not_finite


def require_trainable_norm(norm: float, dtype: torch.dtype, step: float) -> None:
    """Refuse activations whose gradients overflow, and warn of those shorter than a step.

    Args:
        norm: Root mean square norm of the first batch's centred and scaled activations.
        dtype: Of the weights.
        step: Distance by which the first steps of Adam move a point among the activations.

    Raises:
        FloatingPointError: If squares of gradients are not finite in `dtype`.
    """
    # A gradient is about as large as a squared norm, and Adam squares it.
    if norm > torch.finfo(dtype).max ** 0.25:
        raise FloatingPointError(
            f"The activations of the first batch are of norm {norm:.3g}, and {dtype} cannot hold "
            "the squares of their gradients, so nothing would be learnt: look at the model, or "
            "scale them with `data.scale`."
        )
    if 0 < norm < step:
        warnings.warn(
            f"The activations of the first batch are of norm {norm:.3g}, and the first steps of "
            f"Adam move `b_dec` by up to {step:.3g} each: scale them with `data.scale`, or lower "
            "`lr`.",
            stacklevel=2,
        )


@runtime_checkable
class Reduces(Protocol):
    """Reductions over all ranks; see `lightning_sae.distributed.ranks.Ranks`."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""

    def least(self, value: Tensor) -> Tensor:
        """The minimum over all ranks, elementwise."""


def require_finite(
    loss: Float[Tensor, ""],
    losses: Mapping[str, Float[Tensor, ""]],
    x: Float[Tensor, "batch d_in"],
    module: nn.Module,
    step: int,
    ranks: Reduces,
) -> None:
    """Raise a FloatingPointError with step and likely cause if the loss is not finite.

    Args:
        loss: The loss, reduced over all ranks so that all of them raise.
        losses: The terms of the loss by name.
        x: The batch as passed to the objective.
        module: The module in training.
        step: Optimizer steps taken.
        ranks: The ranks that share the batch.
    """
    if torch.isfinite(loss):
        return
    terms = ", ".join(name for name, value in losses.items() if not torch.isfinite(value))
    where = f" in {terms}" if terms else ""
    cause = _cause(terms, x, module, torch.finfo(x.dtype).max ** 0.25, ranks)
    raise FloatingPointError(f"The loss is {loss.item()}{where} at optimizer step {step}; {cause}.")


def _cause(
    terms: str, x: Float[Tensor, "batch d_in"], module: nn.Module, large: float, ranks: Reduces
) -> str:
    """The likely cause of a loss that is not finite: activations, weights or a coefficient."""
    counts = torch.tensor([int((~torch.isfinite(x)).any(-1).sum()), len(x)])
    bad, total = ranks.sum(counts).tolist()
    if bad:
        return (
            f"{bad} of the batch's {total} activations are not finite: look at the model and its "
            "dtype, or drop outliers with `data.max_norm_multiple`"
        )
    largest = torch.stack([weight.detach().abs().max().double() for weight in module.parameters()])
    norms = x.double().square().sum(-1).mean().sqrt()
    norm, weight = (-ranks.least(-torch.stack([norms, largest.max()]))).tolist()
    if norm > large and not weight >= norm:  # on a GPU the weights may be NaN already
        return (
            f"the activations are finite, but of norm {norm:.3g}, and {x.dtype} cannot hold what "
            "is made of their squares: look at the model, scale them with `data.scale`, drop "
            "outliers with `data.max_norm_multiple`, or train in a wider `trainer.precision`"
        )
    if not weight <= large:
        return (
            "the activations are finite: lower `lr` or raise `lr_warmup_steps`, for the weights "
            f"reach {weight:.3g}"
        )
    return (
        f"activations (of norm {norm:.3g}) and weights (up to {weight:.3g}) are finite: lower the "
        f"coefficient of {terms or 'the largest term'}, or `lr`"
    )


def require_finite_weights(
    module: nn.Module, step: int, on_any: Callable[[bool], tuple[bool, ...]] | None = None
) -> None:
    """Raise a FloatingPointError if weights are not finite after a step of training.

    Args:
        module: Has the weights.
        step: Optimizer steps taken.
        on_any: Whether something holds on any of the devices that share the weights.
    """
    bad = not_finite(module.state_dict(), dict(module.named_buffers()))
    if on_any is not None and on_any(bool(bad))[0] and not bad:
        bad = ["on another device"]
    if bad:
        raise FloatingPointError(
            f"The weights are not finite after optimizer step {step} ({', '.join(bad)}), and are "
            "not saved: lower `lr` or raise `lr_warmup_steps`."
        )


class _Step(NamedTuple):
    loss: Tensor
    losses: Mapping[str, Tensor]
    x: Tensor
    number: int
    copied: Copied


class LossCheck:
    """Raises a FloatingPointError if the loss of a step is not finite.

    On a GPU it is raised a step later, when the loss has been copied. The message is about the step
    whose loss is not finite. Checkpoints are safe, for weights are checked before they are saved.
    """

    def __init__(self) -> None:
        self._unread: _Step | None = None

    def __call__(
        self,
        loss: Float[Tensor, ""],
        losses: Mapping[str, Float[Tensor, ""]],
        x: Float[Tensor, "batch d_in"],
        module: nn.Module,
        step: int,
        ranks: Reduces,
    ) -> None:
        """Check a step; the arguments are those of `require_finite`."""
        if not waiting_is_slow(loss.device):
            require_finite(loss, losses, x, module, step, ranks)
            return
        before = self._unread
        self._unread = _Step(loss.detach(), losses, x.detach(), step, Copied(loss))
        if before is not None and not torch.isfinite(before.copied.read()):
            require_finite(before.loss, before.losses, before.x, module, before.number, ranks)

    def __getstate__(self) -> dict[str, Any]:
        return LossCheck().__dict__
