"""Positions of a batch's active latents and the products on them, in a sparse and a dense layout.

Both have the same interface. `values` has one number per entry of the pattern: [nnz] in the sparse
layout, [batch, d_sae] with zeros elsewhere in the dense one.
"""

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_sae.functional.sparse.memory import Workspace, sums_into_memory
from lightning_sae.functional.waiting import waiting_is_slow

with warnings.catch_warnings():  # torch warns once per process
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


@dataclass(frozen=True)
class SparsePattern:
    """Active entries as a list.

    Attributes:
        rows: Row of each entry, in increasing order.
        latents: Latent of each entry.
        shape: Number of rows and of latents.
        workspace: Memory for gradients.
    """

    rows: Int[Tensor, " nnz"]
    latents: Int[Tensor, " nnz"]
    shape: tuple[int, int]
    workspace: Workspace = field(default_factory=Workspace, repr=False, compare=False)

    @classmethod
    def from_flat(
        cls,
        indices: Int[Tensor, " nnz"],
        shape: tuple[int, int],
        workspace: Workspace | None = None,
    ) -> "SparsePattern":
        """The pattern of flat indices `row * d_sae + latent`, ordered by row."""
        kind = torch.int32 if max(*shape, len(indices)) < 2**31 else torch.int64
        rows = indices.div(shape[1], rounding_mode="floor")
        latents = indices - rows * shape[1]
        return cls(rows.to(kind), latents.to(kind), shape, workspace or Workspace())

    @cached_property
    def row_starts(self) -> Int[Tensor, " rows_and_end"]:
        """Index of each row's first entry, and the number of entries."""
        return _starts(self.rows, self.shape[0])

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " latents_and_end"]]:
        """Order of the entries by latent, and the index of each latent's first one in it."""
        return self.latents.argsort(stable=True), _starts(self.latents, self.shape[1])

    # Used by `Code`.

    def count(self) -> int:
        """Number of entries."""
        return len(self.latents)

    def at(self, per_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """The element of a per-latent vector for each entry."""
        return per_latent.index_select(0, self.latents)

    def only(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """The values; the list has no entries outside the pattern to set to zero."""
        return values

    def parted(
        self, values: Float[Tensor, " nnz"], group: Int[Tensor, " d_sae"], n: int
    ) -> list[tuple[Float[Tensor, " _"], "SparsePattern"]]:
        """Values and patterns of n groups of latents."""
        groups = group.index_select(0, self.latents)
        order = groups.argsort(stable=True)  # rows stay in their order
        parts = order.split(_counts(groups, n).tolist())
        picked = [(self.rows.index_select(0, p), self.latents.index_select(0, p)) for p in parts]
        patterns = [replace(self, rows=rows, latents=latents) for rows, latents in picked]
        return [
            (values.index_select(0, places), pattern)
            for places, pattern in zip(parts, patterns, strict=True)
        ]

    def decode(
        self, values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "batch d"]:
        """Sum of the active latents' decoder rows, weighted by their values."""
        return _Decode.apply(values, W_dec, self)

    def row_sums(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " batch"]:
        """Sum of each row's values."""
        return _sums(values, self.rows, self.shape[0])

    def latent_sums(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """Sum of each latent's values."""
        return _sums(values, self.latents, self.shape[1])

    def firings(self, values: Float[Tensor, " nnz"]) -> Int[Tensor, " d_sae"]:
        """Number of rows on which each latent is nonzero."""
        return _counts(self.latents, self.shape[1], values != 0)

    def to_dense(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, "batch d_sae"]:
        """The values as a matrix."""
        places = (self.rows.long(), self.latents.long())
        return values.new_zeros(self.shape).index_put(places, values, accumulate=True)

    # Products on the active entries only.

    def sum_for_rows(
        self, weights: Float[Tensor, " nnz"], vectors: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "batch d"]:
        """For each row, the weighted sum of its latents' vectors."""
        return _sum_of_picked(vectors, self.latents, weights, self.row_starts)

    def sum_for_latents(
        self, weights: Float[Tensor, " nnz"], vectors: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "d_sae d"]:
        """For each latent, the weighted sum of the vectors of its active rows."""
        order, starts = self.by_latent
        rows, weights = self.rows.index_select(0, order), weights.index_select(0, order)
        if not sums_into_memory(vectors):
            return _sum_of_picked(vectors, rows, weights, starts)
        entries = _compressed(starts, rows, weights, self.shape[::-1])
        out = self.workspace.matrix(self.shape[1], vectors.shape[1], vectors)
        return torch.addmm(out, entries, vectors, beta=0.0, out=out)

    def sampled_product(
        self, left: Float[Tensor, "batch d"], right: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, " nnz"]:
        """Inner product of the row of `left` and the row of `right` of each entry."""
        wide = _at_least_float32(left.dtype)  # not implemented in lower precision
        blank = left.new_zeros(len(self.latents), dtype=wide)
        entries = _compressed(self.row_starts, self.latents, blank, self.shape)
        found = torch.sparse.sampled_addmm(entries, left.to(wide), right.to(wide).T, beta=0.0)
        return found.values().to(left.dtype)


@dataclass(frozen=True)
class DensePattern:
    """Active entries as a mask.

    Attributes:
        mask: Whether each latent is active on each row.
    """

    mask: Bool[Tensor, "batch d_sae"]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of latents."""
        return self.mask.shape[0], self.mask.shape[1]

    def count(self) -> Int[Tensor, ""]:
        """Number of entries."""
        return self.mask.count_nonzero()

    def at(self, per_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """The per-latent vector, which broadcasts over rows."""
        return per_latent

    def only(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Values set to zero outside the pattern."""
        return values * self.mask  # on a CPU many times faster than `torch.where`

    def parted(
        self, values: Float[Tensor, "batch d_sae"], group: Int[Tensor, " d_sae"], n: int
    ) -> list[tuple[Float[Tensor, "batch d_sae"], "DensePattern"]]:
        """Values and patterns of n groups of latents."""
        chosen = [group == index for index in range(n)]
        return [(values * own, DensePattern(self.mask & own)) for own in chosen]

    def decode(
        self, values: Float[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "batch d"]:
        """Sum of all latents' decoder rows, weighted by their values."""
        return values @ W_dec

    def row_sums(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        """Sum of each row's values."""
        return values.sum(-1)

    def latent_sums(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
        """Sum of each latent's values."""
        return values.sum(0)

    def firings(self, values: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " d_sae"]:
        """Number of rows on which each latent is nonzero."""
        fires = (values != 0).view(torch.uint8)  # many times faster to sum
        return fires.sum(0, dtype=torch.int32).long()

    def to_dense(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The values, which are already a matrix."""
        return values

    def sum_for_rows(
        self, weights: Float[Tensor, "batch d_sae"], vectors: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "batch d"]:
        """For each row, the weighted sum of its latents' vectors."""
        return weights @ vectors

    def sum_for_latents(
        self, weights: Float[Tensor, "batch d_sae"], vectors: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "d_sae d"]:
        """For each latent, the weighted sum of the vectors of its active rows."""
        return weights.T @ vectors


class EncodeOnPattern(Function):
    """Gradients of pre-activations on a pattern, whose `values` were computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        seen: Tensor,
        _x: Tensor,
        W_enc: Tensor,
        _b_enc: Tensor,
        _origin: Tensor | None,
        on: SparsePattern | DensePattern,
    ) -> Tensor:
        """Return the pre-activations unchanged; `seen` is `x - origin`."""
        ctx.save_for_backward(seen, W_enc)
        ctx.on = on
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x`, `W_enc`, `b_enc` and `origin`."""
        seen, W_enc = ctx.saved_tensors
        on: SparsePattern | DensePattern = ctx.on
        _, _, needs_x, needs_W, _, needs_origin, _ = ctx.needs_input_grad
        dv = on.only(dv)
        db = on.latent_sums(dv)
        dx = on.sum_for_rows(dv, W_enc.T) if needs_x else None
        dW = on.sum_for_latents(dv, seen).T if needs_W else None
        return None, None, dx, dW, db, -(W_enc @ db) if needs_origin else None, None


class _Decode(Function):
    """The sparse product and its two gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, on: SparsePattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.on = on
        return on.sum_for_rows(values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_hat: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        on: SparsePattern = ctx.on
        df = on.sampled_product(dx_hat, W_dec) if ctx.needs_input_grad[0] else None
        dW = on.sum_for_latents(values, dx_hat) if ctx.needs_input_grad[1] else None
        return df, dW, None


def _compressed(starts: Tensor, picks: Tensor, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, picks, weights, shape, check_invariants=False)


def _starts(keys: Int[Tensor, " nnz"], n: int) -> Int[Tensor, " n_and_end"]:
    return F.pad(_counts(keys, n).cumsum(0), (1, 0)).to(keys.dtype)


def _counts(
    keys: Int[Tensor, " nnz"], n: int, counted: Bool[Tensor, " nnz"] | None = None
) -> Int[Tensor, " n"]:
    """How often each key occurs, of all entries or of those that are `counted`."""
    if counted is None and not waiting_is_slow(keys.device):
        return torch.bincount(keys, minlength=n)  # faster, but reads the largest key
    ones = torch.ones_like(keys, dtype=torch.int64) if counted is None else counted.long()
    return ones.new_zeros(n).index_add(0, keys, ones)


def _sums(values: Float[Tensor, " nnz"], keys: Int[Tensor, " nnz"], n: int) -> Float[Tensor, " n"]:
    addends = values.to(_at_least_float32(values.dtype))  # bfloat16 sums stop growing early
    return addends.new_zeros(n).index_add(0, keys, addends).to(values.dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_of_picked(vectors: Tensor, picks: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    # Detached, because torch takes a slower path for tensors that require gradients.
    return F.embedding_bag(
        picks,
        vectors.detach(),
        starts,
        mode="sum",
        per_sample_weights=weights.detach(),
        include_last_offset=True,
    )
