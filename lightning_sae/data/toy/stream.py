"""Batches of toy data: an endless training stream, and fixed held-out samples."""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.data.loaders import ENDLESS

BLOCK_BYTES = 2**22
"""Size of a block: large enough to make overhead small, small enough for a cache."""

Draw = Callable[[int, torch.Generator], Tensor]
"""Draws a number of activations."""


class Blocks:
    """Numbered blocks of activations, each drawn with a separate generator.

    The seed of a block is the seed of the stream plus the block's number. So any block can be drawn
    at any time on any rank, and no two blocks of a stream have the same seed.

    Args:
        draw: Draws activations.
        d_in: Their width.
        batch_size: Activations in a batch.
        seed: Seed of the data.
        stream: Name of the stream; other names and ranks give other samples.
        rank: Rank of the process.
    """

    def __init__(
        self, draw: Draw, d_in: int, batch_size: int, seed: int, stream: str, rank: int
    ) -> None:
        self.draw = draw
        self.batch_size = batch_size
        self.batches_per_block = max(4, BLOCK_BYTES // (4 * d_in * batch_size))
        self.seed = seed_of(seed, stream, rank)

    def __getitem__(self, number: int) -> Float[Tensor, "rows d_in"]:
        generator = torch.Generator().manual_seed(self.seed + number)
        return self.draw(self.batches_per_block * self.batch_size, generator)


def seed_of(seed: int, stream: str, rank: int = 0) -> int:
    """A 32-bit seed; torch's CPU generators use no more bits."""
    name = f"{seed} {stream} {rank}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")


class ToyBatches(Iterator[Tensor]):
    """The endless training stream: views of blocks, in order.

    Its length is never reached, see `EndlessBatches`. Iterating again continues where the last
    iteration stopped. Its only state is the number of batches served, the same on all ranks.

    Args:
        blocks: Where batches are cut from.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.served = 0
        self._block: tuple[Tensor, ...] = ()
        self._number = -1

    def __len__(self) -> int:
        return ENDLESS

    def __next__(self) -> Float[Tensor, "batch_size d_in"]:
        number, place = divmod(self.served, self.blocks.batches_per_block)
        if number != self._number:
            self._block = self.blocks[number].split(self.blocks.batch_size)
            self._number = number
        self.served += 1
        return self._block[place]

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: without the current block, which each of its views would copy as a whole."""
        return {**vars(self), "_block": (), "_number": -1}

    def state_dict(self) -> dict[str, Any]:
        """The number of batches served, and their size."""
        return {"served": self.served, "batch_size": self.blocks.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If its batches had another size.
        """
        if state_dict["batch_size"] != self.blocks.batch_size:
            raise ValueError(
                f"Expected argument `batch_size` to be {state_dict['batch_size']}, as in the "
                f"checkpoint, but got {self.blocks.batch_size}: resume with the settings of the "
                "run."
            )
        self.served = state_dict["served"]


class HeldOutToyBatches:
    """The same samples each time, in batches of at most the size of training batches.

    Args:
        blocks: Where batches are cut from.
        n: Number of samples.
    """

    def __init__(self, blocks: Blocks, n: int) -> None:
        self.blocks = blocks
        self.n = n

    def __len__(self) -> int:
        return math.ceil(self.n / self.blocks.batch_size)

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        stream = ToyBatches(self.blocks)
        for first in range(0, self.n, self.blocks.batch_size):
            yield next(stream)[: self.n - first]
