"""Which pre-activations are active: above a threshold, the k largest of a row or of a batch.

A rule reads pre-activations a chunk of rows at a time, once, and names entries by their flat index
`row * d_sae + latent`, row by row. Scores are compared in the precision they come in, float32 in
training whatever the precision of the products.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.functional.waiting import waiting_is_slow

Chunks = Iterable[tuple[int, Tensor]]
"""Row that a chunk starts at, and its pre-activations [rows, d_sae], valid until the next one."""


GROUPS = (8, 4)
"""Sizes of groups in a search for the largest entries of a row, the fastest first (on a CPU)."""

FEW = 256
"""Entries of a row that each device shows the others without a thought."""


@runtime_checkable
class Among(Protocol):
    """Devices that share a batch; see `parts` and `ranks` in `lightning_sae.distributed`."""

    n: int
    index: int

    def gathered(self, values: Tensor) -> Tensor:
        """The tensors of all devices, in their order, along a new first axis."""


@runtime_checkable
class Rule(Protocol):
    """The interface of a selection rule for `encode`."""

    def mask(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        """Active entries of a whole batch."""
        ...

    def select(self, chunks: Chunks) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """Flat indices, in the order of rows, and values of the active entries of all chunks."""
        ...


@dataclass(frozen=True)
class Above:
    """Entries strictly above a threshold: one for all latents, or [d_sae], one for each.

    Example:
        >>> Above(0.0).mask(torch.tensor([[0.0, 1.0], [-1.0, 0.5]]))
        tensor([[False,  True],
                [False,  True]])
    """

    threshold: float | Float[Tensor, " d_sae"] = 0.0

    def mask(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        """Active entries of a whole batch."""
        return pre > self.threshold

    def select(self, chunks: Chunks) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """Flat indices and values of the active entries of all chunks."""
        return _joined(_picked(row, pre, self.mask(pre)) for row, pre in chunks)


@dataclass(frozen=True)
class TopK:
    """The k largest entries of each row; among equal entries, only as many as fit.

    Args:
        k: Entries per row.
        among: Devices that each have some of the latents of each row; the largest entries over all
            of them are selected.

    Example:
        >>> TopK(2).mask(torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, -2.0]]))
        tensor([[ True, False,  True],
                [ True,  True, False]])
    """

    k: int
    among: Among | None = None

    def largest(
        self, pre: Float[Tensor, "rows d_sae"]
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """Values and latents of the largest entries of each row, in no order.

        Of several devices, those of this one. There are then k, or all, on each: values of those
        that are not selected are minus infinity.
        """
        values, latents = row_top_k(pre, min(self.k, pre.shape[-1]))
        if self._is_divided:
            values = values.where(chosen_among(values, self.k, self.among), -math.inf)
        return values, latents

    @property
    def _is_divided(self) -> bool:
        return self.among is not None and self.among.n > 1

    def mask(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        """Active entries of a whole batch."""
        values, latents = self.largest(pre)
        active: Any = values > -math.inf if self._is_divided else True
        return torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, latents, active)

    def select(self, chunks: Chunks) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """Flat indices and values of the active entries of all chunks."""
        return _joined(self._picked(row, pre) for row, pre in chunks)

    def _picked(self, row: int, pre: Tensor) -> tuple[Tensor, Tensor]:
        values, latents = self.largest(pre)
        rows = torch.arange(row, row + len(pre), device=pre.device).unsqueeze(-1)
        indices, values = (rows * pre.shape[-1] + latents).view(-1), values.view(-1)
        if not self._is_divided:
            return indices, values
        active = values > -math.inf
        return indices[active], values[active]


@dataclass(frozen=True)
class BatchTopK:
    """The k * batch largest entries of a batch, however they fall on its rows.

    In chunks, the entries kept so far bound the final threshold from below: those under the bound
    are dropped at once, so one pass is enough and the result is exact. On a GPU their number would
    have to be read, so the largest of each chunk are kept instead.

    The batch may lie on several devices: on some ranks, each with some of its rows, and in some
    parts, each with some of the latents of a rank's rows. The largest entries over all devices are
    selected, see `chosen_among`. This is exact however they fall on the latents. With more than two
    ranks, each keeps twice as many candidates as a rank has on average; it is then exact unless the
    rows of one rank have more, which does not happen with a shuffled stream.

    Args:
        k: Entries per row on average; k * batch is rounded.
        n_rows: Rows of the batch, or of a rank's part of it.
        n_ranks: Number of ranks, each with `n_rows` rows.
        among: All devices that share the batch.

    Example:
        >>> BatchTopK(1, n_rows=2).mask(torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.5, -1.0]]))
        tensor([[ True,  True, False],
                [False, False, False]])
    """

    k: float
    n_rows: int
    n_ranks: int = 1
    among: Among | None = None

    @property
    def total(self) -> int:
        """Number of selected entries of the whole batch, over all devices."""
        return max(1, round(self.k * self.n_rows * self.n_ranks))

    @property
    def wanted(self) -> int:
        """Number of this device's candidate entries."""
        return min(self.total, 2 * math.ceil(self.total / self.n_ranks))

    def mask(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        """Active entries of a whole batch."""
        flat = pre.flatten()
        largest = _largest(flat, self.wanted)
        if self._is_divided:
            largest = largest[self._chosen(flat[largest])]
        return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, largest, 1).view_as(pre)

    def select(self, chunks: Chunks) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """Flat indices and values of the active entries of all chunks."""
        found: list[tuple[Tensor, Tensor]] = []
        bound: Tensor | None = None
        for row, pre in chunks:
            if waiting_is_slow(pre.device):
                picked = self._largest_of(row, pre)
            else:
                picked = _picked(row, pre, pre >= (self._guess(pre) if bound is None else bound))
                if bound is None and len(picked[1]) < self.wanted:  # dropped ones may be needed
                    picked = _picked(row, pre, torch.ones_like(pre, dtype=torch.bool))
            indices, values = _joined([*found, picked])
            if len(values) >= self.wanted:
                kept = _largest(values, self.wanted).sort().values
                indices, values = indices[kept], values[kept]
                bound = values.min()
            found = [(indices, values)]
        indices, values = found[0]
        if self._is_divided:
            chosen = self._chosen(values)
            indices, values = indices[chosen], values[chosen]
        return indices, values

    def _largest_of(self, row: int, pre: Float[Tensor, "rows d_sae"]) -> tuple[Tensor, Tensor]:
        flat = pre.view(-1)
        indices = _largest(flat, self.wanted).sort().values
        return indices + row * pre.shape[-1], flat.index_select(0, indices)

    @property
    def _is_divided(self) -> bool:
        return self.among is not None and self.among.n > 1

    def _chosen(self, values: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        assert self.among is not None
        return chosen_among(values.unsqueeze(0), self.total, self.among).squeeze(0)

    def _guess(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, ""]:
        """A threshold, estimated on a few rows, that keeps slightly more entries than needed."""
        if self.wanted >= pre.numel():
            return pre.new_full((), -math.inf)
        sample = pre[:: max(1, len(pre) // 32)].flatten()
        count = math.ceil(1.25 * self.wanted * len(sample) / pre.numel()) + 32
        return sample.topk(min(count, len(sample)), sorted=False).values.min()


def chosen_among(
    values: Float[Tensor, "rows n"], k: int, among: Among | None
) -> Bool[Tensor, "rows n"]:
    """Which of this device's entries are among the k largest of their row over all devices.

    Each device shows the others its largest entries of each row: all that might be chosen if these
    are few, otherwise twice as many as are chosen on average, and twice as many again as long as
    all that a device has shown are chosen. So the result is exact. Among equal entries only as many
    as fit are chosen.

    Args:
        values: The k largest entries of each row on this device, or all if there are fewer. Each
            device has equally many rows.
        k: Entries per row.
        among: The devices; None or one device has all entries.
    """
    if among is None or among.n == 1:
        return torch.ones_like(values, dtype=torch.bool)
    ordered, order = values.sort(dim=-1, descending=True)
    size = k if k <= FEW else min(k, 2 * math.ceil(k / among.n))
    while True:
        # All devices must show equally many: pad with values that are chosen last.
        shown = F.pad(ordered[:, :size], (0, max(0, size - ordered.shape[1])), value=-math.inf)
        of_all = among.gathered(shown).movedim(0, 1)
        best = of_all.flatten(1).topk(min(k, among.n * size), sorted=False).indices
        flat = torch.zeros_like(of_all, dtype=torch.bool).flatten(1).scatter_(1, best, value=True)
        chosen = flat.view_as(of_all)
        if size == k or not chosen[..., -1].any():
            break
        size = min(k, 2 * size)
    own = chosen[:, among.index, : ordered.shape[1]]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, : own.shape[1]], own)


def row_top_k(
    pre: Float[Tensor, "rows d_sae"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest entries of each row and their indices, unordered.

    They lie within the k groups with the largest maxima, because for an entry of another group
    there are k entries that are at least as large. The groups are found in the same way, so a
    search in a long row becomes several in short ones.
    """
    rows, n = pre.shape
    group = next((size for size in GROUPS if n % size == 0 and n >= 4 * k * size), None)
    if group is None:
        values, latents = pre.topk(k, dim=-1, sorted=False)
        return values, latents
    # Strided, so that maxima are taken in whole rows.
    groups = pre.unflatten(1, (group, n // group))
    _, best = row_top_k(groups.amax(1), k)
    candidates = groups.gather(2, best.unsqueeze(1).expand(rows, group, k)).view(rows, group * k)
    values, found = candidates.topk(k, dim=-1, sorted=False)
    return values, found.div(k, rounding_mode="floor") * (n // group) + best.gather(1, found % k)


def _largest(values: Float[Tensor, " n"], count: int) -> Int[Tensor, " k"]:
    return values.topk(min(count, len(values)), sorted=False).indices


def _picked(first_row: int, pre: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    indices = true_places(mask.view(-1))
    return indices + first_row * pre.shape[-1], pre.view(-1).index_select(0, indices)


def true_places(mask: Bool[Tensor, " n"]) -> Int[Tensor, " nnz"]:
    """Increasing indices where a mask is true; faster than `nonzero` if few are.

    Eight neighbours are first tested as one word. Not on a GPU, which would wait twice.

    Example:
        >>> true_places(torch.tensor([0, 1, 0, 0, 0, 0, 0, 1] + 8 * [0]).bool())
        tensor([1, 7])
    """
    slow = waiting_is_slow(mask.device)
    if slow or len(mask) % 8 or mask.storage_offset() % 8 or mask.stride(0) != 1:
        return mask.nonzero().squeeze(-1)
    words = mask.view(torch.int64).nonzero().squeeze(-1)
    word, place = mask.view(-1, 8).index_select(0, words).nonzero(as_tuple=True)
    return words.index_select(0, word) * 8 + place


def _joined(found: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    indices, values = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(values)
