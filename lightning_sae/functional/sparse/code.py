r"""Sparse codes: one dense product with the dictionary; the rest on active latents only.

A training step needs x W_enc for all latents to find the active ones. Everything after that needs
only those. Let S be the set of active pairs (i, j) of a row and a latent:

.. math::
    v_{ij} &= x_i \cdot W_{enc,j} + b_{enc,j} \text{ on } S
        & \text{the dense product, kept on } S \\
    \hat x_i &= \sum_j f_{ij} W_{dec,j}
        & \text{a sparse product} \\
    df_{ij} &= d\hat x_i \cdot W_{dec,j} \text{ on } S
        & \text{a product sampled on } S \\
    dW_{dec,j} &= \sum_i f_{ij}\, d\hat x_i
        & \text{a transposed sparse product} \\
    dW_{enc,j} &= \sum_i dv_{ij}\, x_i, \quad dx_i = \sum_j dv_{ij} W_{enc,j}
        & \text{the same two for } dv

All sums run over S. The first line defines v; f is an elementwise function of v and of per-latent
parameters. Since the reconstruction is linear in f, and f is constant 0 outside S, the other lines
follow from the chain rule and are exact. The gradient of `b_enc` is db, the sum of dv over rows. A
`b_dec` that is subtracted from the encoder's input gets -W_enc db (the sum of -dx) in addition to
its gradient from the decoder.

While many latents are active, as in the first steps with an L1 penalty, dense products are faster.
`Code` then holds a matrix with zeros and has the same interface. `Layout` chooses between the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sae.functional.sparse.memory import Workspace
from lightning_sae.functional.sparse.patterns import DensePattern, EncodeOnPattern, SparsePattern
from lightning_sae.functional.sparse.selection import Rule
from lightning_sae.functional.waiting import Copied, waiting_is_slow

# Shares of active latents between which the layout is not switched. On two CPU cores both layouts
# are equally fast at .12 (d 64) to .19 (d 512; F 1024 and 8192). Other devices have faster dense
# products; their values are not measured here but those at which other libraries' kernels switch.
SWITCH = {"cpu": (0.13, 0.18)}
SWITCH_ELSEWHERE = (0.004, 0.006)


@dataclass
class Layout:
    """The layout of the next batch's code, chosen by the share of active latents in earlier ones.

    Attributes:
        dense: Whether codes are matrices, as at the start, when half of all latents are active.
        thresholds: Shares of active latents. Below the first the layout becomes sparse, above the
            second dense; the gap avoids switching back and forth. By default those of the device.
        workspace: Memory reused between steps.
        unread: On a GPU, the share of the last batch with a dense code. It is read a batch later,
            so that training does not wait for it.
    """

    dense: bool = True
    thresholds: tuple[float, float] | None = None
    workspace: Workspace = field(default_factory=Workspace, repr=False, compare=False)
    unread: Copied | None = field(default=None, repr=False, compare=False)

    @property
    def last_share(self) -> float:
        """The share that is not read yet, for a checkpoint; -1 without one."""
        return -1.0 if self.unread is None else self.unread.read().item()

    @last_share.setter
    def last_share(self, share: float) -> None:
        self.unread = None if share < 0 else Copied(torch.tensor(share))

    def see(
        self, count: int | Int[Tensor, ""], size: int, device: torch.device | str = "cpu"
    ) -> None:
        """Update the layout from the active entries of a batch.

        Args:
            count: Number of active entries.
            size: Number of entries, active or not.
            device: Device of the batch.
        """
        device, before = torch.device(device), self.unread
        self.unread = None
        if not isinstance(count, Tensor) or not waiting_is_slow(device):
            share = int(count) / max(1, size)
        else:
            self.unread = Copied(count / max(1, size))
            if before is None:
                return
            share = before.read().item()
        below, above = self.thresholds or SWITCH.get(device.type, SWITCH_ELSEWHERE)
        self.dense = share > (below if self.dense else above)


@dataclass(frozen=True)
class Code:
    """Latents of a batch: the values of the active entries and their positions.

    Loss terms are written once for both layouts, elementwise on `values` and with the methods
    below. They must be 0 for a value of 0.

    Attributes:
        values: [nnz] in the sparse layout, [batch, d_sae] in the dense one.
        pattern: Their positions.
    """

    values: Float[Tensor, "..."]
    pattern: SparsePattern | DensePattern

    @classmethod
    def of_matrix(cls, f: Float[Tensor, "batch d_sae"]) -> "Code":
        """The code of a matrix of latents."""
        return cls(f, DensePattern(f != 0))

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of latents."""
        return self.pattern.shape

    def at(self, per_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " ..."]:
        """A per-latent vector in a shape that broadcasts with `values`."""
        return self.pattern.at(per_latent)

    def with_values(self, values: Float[Tensor, "..."]) -> "Code":
        """The same entries with new values, computed elementwise from `values`."""
        return Code(self.pattern.only(values), self.pattern)

    def parted(self, group: Int[Tensor, " d_sae"], n: int) -> list["Code"]:
        """The code in n parts, each with the entries of the latents of a group from 0 to n - 1."""
        return [Code(*part) for part in self.pattern.parted(self.values, group, n)]

    def decode(self, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        """Reconstruction, without a bias."""
        return self.pattern.decode(self.values, W_dec)

    def row_sums(self) -> Float[Tensor, " batch"]:
        """Sum of each row's values."""
        return self.pattern.row_sums(self.values)

    def mean_sum(self, terms: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """Per-entry terms, summed over latents and averaged over the batch."""
        return self.pattern.only(terms).sum() / self.shape[0]

    def firings(self) -> Int[Tensor, " d_sae"]:
        """Number of rows on which each latent is nonzero."""
        return self.pattern.firings(self.values)

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        """The latents as a matrix."""
        return self.pattern.to_dense(self.values)


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    rule: Rule,
    layout: Layout | None = None,
    chunk_rows: int | None = None,
    origin: Float[Tensor, " d_in"] | None = None,
) -> Code:
    """Pre-activations `(x - origin) @ W_enc + b_enc` of the latents that a rule selects.

    Args:
        x: Activations.
        W_enc: Encoder. Faster if stored latent by latent, so that `W_enc.T` is contiguous.
        b_enc: Encoder bias.
        rule: Selects the active entries; no gradient flows through the selection.
        layout: Chooses the layout and is updated with the density; without it the code is sparse.
        chunk_rows: Rows of pre-activations held at a time in the sparse layout; by default
            `default_chunk_rows`.
        origin: Subtracted from `x` before encoding, usually `b_dec`.

    Returns:
        The code, with exact gradients for all tensors. Under autocast only the product is computed
        in lower precision.
    """
    found: SparsePattern | DensePattern
    with torch.no_grad():
        seen = x if origin is None else x - origin
        if layout is not None and layout.dense:
            values, found = _dense(seen, W_enc, b_enc, rule)
        else:
            workspace = Workspace() if layout is None else layout.workspace
            chunks = _pre_activation_chunks(seen, W_enc, b_enc, workspace, chunk_rows)
            indices, values = rule.select(chunks)
            found = SparsePattern.from_flat(indices, (len(x), len(b_enc)), workspace)
        if layout is not None:
            layout.see(found.count(), len(x) * len(b_enc), x.device)
    return Code(EncodeOnPattern.apply(values, seen, x, W_enc, b_enc, origin, found), found)


def _dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule) -> tuple[Tensor, DensePattern]:
    pre = pre_activations(x, W_enc, b_enc)
    found = DensePattern(rule.mask(pre))
    return pre.mul_(found.mask), found


def pre_activations(
    x: Float[Tensor, "... d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    out: Float[Tensor, "... d_sae"] | None = None,
) -> Float[Tensor, "... d_sae"]:
    """`x @ W_enc + b_enc`; under autocast the sum has the precision of the bias."""
    if torch.is_autocast_enabled(x.device.type) or x.ndim != 2:
        return torch.add(x @ W_enc, b_enc, out=out)
    return torch.addmm(b_enc, x, W_enc, out=out)


def default_chunk_rows(d_sae: int, device: str = "cpu", dense: bool = False) -> int:
    """Rows of pre-activations held at a time: 64 MiB of float32, but at least 512 rows.

    Fewer rows slow down the product; more only cost memory. In the dense layout it is 16 MiB,
    because there are several such matrices and the C library does not reuse larger blocks. On other
    devices it is 1 GiB.

    Example:
        >>> default_chunk_rows(2048), default_chunk_rows(65536)
        (8192, 512)
    """
    on_cpu = 2**22 if dense else 2**24
    return max(512, (on_cpu if device == "cpu" else 2**28) // d_sae)


def _pre_activation_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, workspace: Workspace, chunk_rows: int | None
) -> Iterator[tuple[int, Tensor]]:
    rows = chunk_rows or default_chunk_rows(len(b_enc), x.device.type)
    scratch = workspace.scratch(min(rows, len(x)), len(b_enc), x)
    for i, chunk in enumerate(x.split(rows)):
        yield i * rows, pre_activations(chunk, W_enc, b_enc, out=scratch[: len(chunk)])
