"""Base class of the metrics: sums and counts that add up exactly over batches and ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class SumsAndCounts(Metric):
    """A metric whose states are sums in float64 and counts in int64.

    A subclass adds its states in the order in which its update function returns their increments.
    State names must be specific: a `MetricCollection` merges metrics whose states have the same
    names and equal values after the first batch, and updates only one of them.

    Converting the module that holds the metric (`module.half()`, `module.to(torch.bfloat16)`, or
    the Trainer's `precision="bf16-true"`) does not change the states' dtypes.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a float64 state that starts at zero."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_count(self, name: str, *shape: int) -> None:
        """Add an int64 state that starts at zero."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def accumulate(self, *increments: Tensor | int) -> None:
        """Add one increment to each state, in the order in which the states were added."""
        for name, increment in zip(self._defaults, increments, strict=True):
            # Not in place, because a state reset in inference mode may be updated outside of it.
            state = getattr(self, name)
            setattr(self, name, (state + increment).to(state.dtype))

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        if self._dtype_convert:  # an explicit `set_dtype`
            return super()._apply(fn, exclude_state)
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


def require_last_axis(argument: str, tensor: Tensor, size_name: str, size: int) -> None:
    """Raise a ValueError if the last axis of `tensor` is not `size`."""
    if tensor.shape[-1:] != (size,):
        raise ValueError(
            f"Expected argument `{argument}` to have shape [..., {size_name}] with "
            f"{size_name}={size} but got {tuple(tensor.shape)}: create the metric with the "
            f"`{size_name}` of the SAE."
        )
