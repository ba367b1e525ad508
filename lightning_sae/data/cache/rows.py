"""Rows of activations in several tensors, usually mapped from files."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

ByHook = dict[str, Float[Tensor, "_ _"]]
"""The same rows at one hook or several."""


class Rows:
    """The rows of several shards, one shard after the other.

    Args:
        shards: For each shard, a tensor [rows, width] by hook; widths and dtypes are the same in
            all.
    """

    def __init__(self, shards: Sequence[Mapping[str, Float[Tensor, "_ _"]]]) -> None:
        self.shards = shards
        self._starts = torch.tensor([0, *(_length(shard) for shard in shards)]).cumsum(0)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def widths(self) -> dict[str, int]:
        """Width at each hook."""
        return {name: part.shape[1] for name, part in self.shards[0].items()} if self.shards else {}

    @property
    def row_bytes(self) -> int:
        """Bytes of a row at all hooks."""
        parts = self.shards[0].values() if self.shards else ()
        return sum(part.shape[1] * part.element_size() for part in parts)

    def only(self, hook_names: Sequence[str]) -> "Rows":
        """The same rows at some of the hooks, in the given order."""
        return Rows([{name: shard[name] for name in hook_names} for shard in self.shards])

    def take(self, index: Int[Tensor, " n"]) -> ByHook:
        """Copies of the rows `index`, in that order; read in file order."""
        ordered, places = index.sort()
        back = torch.empty_like(places)
        back[places] = torch.arange(len(places))
        return {name: rows.index_select(0, back) for name, rows in self.read(ordered).items()}

    def read(self, ordered: Int[Tensor, " n"]) -> ByHook:
        """Copies of rows with ascending indices."""
        bounds = torch.searchsorted(ordered, self._starts).tolist()
        found = {
            name: part.new_empty(len(ordered), part.shape[1])
            for name, part in self.shards[0].items()
        }
        for shard, start, first, end in zip(
            self.shards, self._starts.tolist(), bounds[:-1], bounds[1:], strict=False
        ):
            if first < end:
                own = ordered[first:end] - start
                for name, part in shard.items():
                    torch.index_select(part, 0, own, out=found[name][first:end])
        return found

    def between(self, start: int, stop: int) -> "Rows":
        """The rows from `start` to `stop` (exclusive), without a copy."""
        firsts = self._starts.tolist()
        parts = []
        for shard, first in zip(self.shards, firsts, strict=False):
            low, high = max(start - first, 0), min(stop - first, _length(shard))
            if low < high:
                parts.append({name: rows[low:high] for name, rows in shard.items()})
        return Rows(parts)

    def all(self) -> ByHook:
        """All rows in one tensor for each hook."""
        return {name: _joined([shard[name] for shard in self.shards]) for name in self.widths}


def _length(shard: Mapping[str, Tensor]) -> int:
    return len(next(iter(shard.values())))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
