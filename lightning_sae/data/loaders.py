"""What Lightning iterates over."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightning_sae.data.buffer import ShuffleBuffer

Rows = Any
"""Activations [batch, d_in] of one hook, or a dictionary of them by hook if there are several.

Typed as `Any`: with one hook it is used as a tensor, with several as a dictionary.
"""

ENDLESS = 2**40
"""Batches in an endless loader: more than any run has, few enough to sum over ranks."""


class EndlessBatches:
    """Batches of a buffer for as long as the trainer asks.

    Lightning asks a loader of unknown length for one batch more than it trains on, which a
    checkpoint would then count as used. So the loader says a length that is never reached.
    Iterating again goes on where the last iteration stopped. The state proper is the data
    module's; the loader's own says how many batches that state should be behind.

    Args:
        buffer: Where the batches come from.
        given_as: What is made of a batch's rows before it is given away.
    """

    def __init__(self, buffer: ShuffleBuffer, given_as: Callable[[Tensor], Rows]) -> None:
        self.buffer, self.given_as = buffer, given_as

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Rows]:
        return map(self.given_as, self.buffer)

    def state_dict(self) -> dict[str, int]:
        """Rows served of the present buffer."""
        return {"served": self.buffer.served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to do: the data module restores the buffer."""
