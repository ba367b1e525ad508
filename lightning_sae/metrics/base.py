"""What every metric here is: sums and counts, exact to add up over batches and ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class SumsAndCounts(Metric):
    """A metric whose states are sums in float64 and counts in int64.

    A subclass adds its states in the order in which its update function returns their increments.
    State names must say what is summed: a `MetricCollection` takes two metrics with the same
    state names and equal values after the first batch for one, and updates only the first.

    Converting the module that holds the metric (`module.half()`, `module.to(torch.bfloat16)`,
    which is what the Trainer's `precision="bf16-true"` does) leaves the states' dtypes alone.
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
            # Not in place: a state that was reset in inference mode may be updated outside of it.
            state = getattr(self, name)
            setattr(self, name, (state + increment).to(state.dtype))

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        if self._dtype_convert:  # `set_dtype`, the one explicit way to ask for it
            return super()._apply(fn, exclude_state)
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


def require_positive(name: str, value: int) -> int:
    """Check a size.

    Raises:
        ValueError: If `value` is not positive.
    """
    if value <= 0:
        raise ValueError(f"Expected `{name}` to be a positive integer, but got {value}")
    return value


def require_last_axis(argument: str, tensor: Tensor, size_name: str, size: int) -> None:
    """Check that a tensor given to a metric has the width for which the metric was made.

    Raises:
        ValueError: If it has another.
    """
    if tensor.shape[-1:] != (size,):
        raise ValueError(
            f"Expected `{argument}` to have shape [..., {size_name}] with {size_name} = {size}, "
            f"but got {tuple(tensor.shape)}: make the metric with the {size_name} of the SAE"
        )
