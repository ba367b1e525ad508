"""Removing the lowest activations of a trained SAE's latents.

Every function here only sets entries to zero. A latent fires where its activation is above zero;
only firings are counted. Source of the four methods: Riggs, Improving SAE's by Sqrt()-ing L1 and
removing lowest activating features (2024). Three of them are thresholds, per latent or global,
which `Firings` computes for a given share of firings to remove.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sae.checks import require_not_negative


def without_below(
    f: Float[Tensor, "... d_sae"], threshold: float | Float[Tensor, " d_sae"]
) -> Float[Tensor, "... d_sae"]:
    """Set activations strictly below a threshold to zero.

    Args:
        f: Latent activations, at least 0.
        threshold: One for all latents or one per latent, in the units of `f`.

    Example:
        >>> without_below(torch.tensor([0.1, 0.5, 2.0]), 0.5)
        tensor([0.0000, 0.5000, 2.0000])
    """
    return f * (f >= threshold)


def without_lowest(
    f: Float[Tensor, "... d_sae"], k: int, ranks: Int[Tensor, "... d_sae"] | None = None
) -> Float[Tensor, "... d_sae"]:
    """Set the k lowest firings of each token to zero, or all if it has at most k.

    Args:
        f: Latent activations, at least 0.
        k: Firings to remove per token; ties are broken in favor of removing earlier latents.
        ranks: `ranks_among_firing(f)`, if already computed.

    Raises:
        ValueError: If `k` is negative.

    Example:
        >>> without_lowest(torch.tensor([[0.1, 0.0, 2.0, 0.1]]), k=1)
        tensor([[0.0000, 0.0000, 2.0000, 0.1000]])
    """
    require_not_negative(k=k)
    return f * ((ranks_among_firing(f) if ranks is None else ranks) >= k)


def ranks_among_firing(f: Float[Tensor, "... d_sae"]) -> Int[Tensor, "... d_sae"]:
    """Rank of each firing among those of the same token, with 0 for the lowest.

    Equal activations are ranked in the order of their latents, so ranks are distinct. Latents that
    do not fire have rank 0.

    Example:
        >>> ranks_among_firing(torch.tensor([[0.5, 0.0, 2.0, 0.1]]))
        tensor([[1, 0, 2, 0]], dtype=torch.int32)
    """
    fires = f > 0
    n_silent = (~fires).sum(-1, keepdim=True)
    order = f.sort(dim=-1, stable=True).indices  # silent latents come first
    place = torch.arange(f.shape[-1], device=f.device).expand_as(f)
    ranks = torch.zeros(f.shape, dtype=torch.int32, device=f.device)
    return ranks.scatter_(-1, order, (place - n_silent).to(torch.int32)) * fires


class Firings(NamedTuple):
    """All firings on some text, from which thresholds for removal are computed.

    Attributes:
        maxima: Largest activation of each latent; 0 if it never fired.
        values: All activations above 0, grouped by latent and sorted in increasing order.
        counts: Number of firings of each latent.
        per_token: Number of latents that fire on each token.
    """

    maxima: Float[Tensor, " d_sae"]
    values: Float[Tensor, " firings"]
    counts: Int[Tensor, " d_sae"]
    per_token: Int[Tensor, " tokens"]

    def global_threshold(self, share: float) -> float:
        """The threshold below which a share of all firings lies.

        Args:
            share: Share in [0, 1).
        """
        return float(_lowest_kept(self.values, share))

    def quantile_thresholds(self, share: float) -> Float[Tensor, " d_sae"]:
        """Thresholds below which a share of each latent's firings lies, rounded down.

        Args:
            share: Share in [0, 1).

        Returns:
            Thresholds in the units of the latents; 0 for a latent that never fired.
        """
        starts = self.counts.cumsum(0) - self.counts
        kept_from = starts + (_checked(share) * self.counts).long()
        # The index of a latent without firings may be past the end.
        padded = torch.cat([self.values, self.values.new_zeros(1)])
        return padded[kept_from] * (self.counts > 0)

    def share_of_maximum(self, share: float) -> float:
        """The fraction of each latent's maximum below which a share of all firings lies.

        Args:
            share: Share in [0, 1).
        """
        maxima = self.maxima.repeat_interleave(self.counts)
        return float(_lowest_kept(self.values / maxima, share))

    def lowest_per_token(self, share: float) -> int:
        """Firings to remove per token so that a share of all firings is removed.

        Tokens with fewer firings lose all of them. The result is the closest integer.

        Args:
            share: Share in [0, 1).
        """
        tokens_with = torch.bincount(self.per_token).flip(0).cumsum(0).flip(0)[1:].double()
        removed = torch.cat([tokens_with.new_zeros(1), tokens_with.cumsum(0)])
        return int((removed - _checked(share) * self.per_token.sum()).abs().argmin())


def firings(batches: Iterable[Float[Tensor, "_ d_sae"]]) -> Firings:
    """Collect all activations above 0; memory grows with tokens times L0.

    Args:
        batches: Latent activations.

    Example:
        >>> found = firings([torch.tensor([[3.0, 0.0], [1.0, 5.0]])])
        >>> found.values, found.counts, found.quantile_thresholds(0.5)
        (tensor([1., 3., 5.]), tensor([2, 1]), tensor([3., 5.]))
    """
    latents, values, per_token = [], [], []
    d_sae = 0
    for f in batches:
        d_sae = f.shape[-1]
        where = f.nonzero(as_tuple=True)
        latents.append(where[1])
        values.append(f[where])
        per_token.append((f > 0).sum(-1))
    latent, value = torch.cat(latents), torch.cat(values)
    order = value.sort(stable=True).indices
    order = order[latent[order].sort(stable=True).indices]
    counts = torch.bincount(latent, minlength=d_sae)
    maxima = value.new_zeros(d_sae).scatter_reduce(0, latent, value, "amax")
    return Firings(maxima, value[order], counts, torch.cat(per_token))


def _lowest_kept(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """The lowest value that is left after removing the lowest share of the values."""
    n_gone = int(_checked(share) * len(values))
    return values.kthvalue(n_gone + 1).values if len(values) else values.new_zeros(())


def _checked(share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"Expected argument `share` to be in [0, 1) but got {share}.")
    return share
