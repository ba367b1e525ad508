"""The check that the loss is finite, without waiting for a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sae.checks import Reduces, require_finite
from lightning_sae.functional.waiting import Copied, waiting_is_slow


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
