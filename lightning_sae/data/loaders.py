"""What Lightning iterates over."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_sae.data.buffer import ShuffleBuffer

if TYPE_CHECKING:
    from lightning_sae.data.datamodule import ActivationDataModule

Rows = Any
"""Activations [batch, d_in] of one hook, or a dictionary of them by hook if there are several.

Not spelled out, for whoever has one hook knows that it is a tensor.
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


class HeldOutBatches:
    """Held-out activations in order, in batches of at most the size of training's.

    Each pass of the model gives the same number of batches, however many activations are left
    out, for all ranks must see equally many.

    Args:
        data: The data module.
        n: Activations before filtering, about.
    """

    def __init__(self, data: "ActivationDataModule", n: int) -> None:
        self.data = data
        self.n = n
        per_pass = data.blocks_per_pass * data.context_length
        self._batches_per_pass = math.ceil(per_pass / data.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        model, keep = self.data.language_model, self.data.filter
        for tokens in self.data.held_out_tokens(self.n, equal_passes=True):
            activations = model.activations(tokens)
            kept = keep.kept(tokens, activations).to(activations.device)
            batches = activations[kept].float().tensor_split(self._batches_per_pass)
            yield from map(self.data.by_hook, batches)
