"""Removing the lowest activations of a trained SAE's latents.

What is kept stays as it is: every function here only sets entries to zero. A latent fires where its
activation is above zero; one that does not fire is never counted. Source of the ways to remove:
Riggs, Improving SAE's by Sqrt()-ing L1 and removing lowest activating features (2024). Three of the
four are thresholds, one for each latent or one for all, which `Firings` gives for a share to be
removed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def without_below(
    f: Float[Tensor, "... d_sae"], threshold: float | Float[Tensor, " d_sae"]
) -> Float[Tensor, "... d_sae"]:
    """Latent activations with those below a threshold set to zero; one that is equal stays.

    Args:
        f: Latent activations, at least 0.
        threshold: In the units of `f`, one for all latents or for each its own.

    Example:
        >>> without_below(torch.tensor([0.1, 0.5, 2.0]), 0.5)
        tensor([0.0000, 0.5000, 2.0000])
    """
    return f * (f >= threshold)


def without_lowest(
    f: Float[Tensor, "... d_sae"], k: int, ranks: Int[Tensor, "... d_sae"] | None = None
) -> Float[Tensor, "... d_sae"]:
    """Latent activations with the k lowest of each token set to zero, or all if it has no more.

    Args:
        f: Latent activations, at least 0.
        k: How many firings each token loses; of equal ones those of earlier latents.
        ranks: `ranks_among_firing(f)`, where that is known already.

    Raises:
        ValueError: If `k` is negative.

    Example:
        >>> without_lowest(torch.tensor([[0.1, 0.0, 2.0, 0.1]]), k=1)
        tensor([[0.0000, 0.0000, 2.0000, 0.1000]])
    """
    if k < 0:
        raise ValueError(f"Expected argument `k` to be at least 0 but got {k}.")
    return f * ((ranks_among_firing(f) if ranks is None else ranks) >= k)


def ranks_among_firing(f: Float[Tensor, "... d_sae"]) -> Int[Tensor, "... d_sae"]:
    """How many firings of the same token come before each one, from the lowest on.

    Equal activations come in the order of their latents, so that no two firings of a token share a
    rank. Latents that do not fire have rank 0.

    Example:
        >>> ranks_among_firing(torch.tensor([[0.5, 0.0, 2.0, 0.1]]))
        tensor([[1, 0, 2, 0]], dtype=torch.int32)
    """
    fires = f > 0
    n_silent = (~fires).sum(-1, keepdim=True)
    order = f.sort(dim=-1, stable=True).indices  # those that do not fire stand first
    place = torch.arange(f.shape[-1], device=f.device).expand_as(f)
    ranks = torch.zeros(f.shape, dtype=torch.int32, device=f.device)
    return ranks.scatter_(-1, order, (place - n_silent).to(torch.int32)) * fires


class Firings(NamedTuple):
    """How strongly latents fire on some text: what levels of removal follow from.

    Attributes:
        maxima: Largest activation of each latent; 0 for one that never fired.
        values: All activations above 0, latent by latent, each latent's from low to high.
        counts: How many of them are each latent's.
        per_token: How many latents fire on each token.
    """

    maxima: Float[Tensor, " d_sae"]
    values: Float[Tensor, " firings"]
    counts: Int[Tensor, " d_sae"]
    per_token: Int[Tensor, " tokens"]

    def global_threshold(self, share: float) -> float:
        """The threshold below which lies a share of all firings.

        Args:
            share: From 0 to below 1.
        """
        return float(_lowest_kept(self.values, share))

    def quantile_thresholds(self, share: float) -> Float[Tensor, " d_sae"]:
        """Thresholds below each of which lies a share of its latent's firings, rounded down.

        Args:
            share: From 0 to below 1.

        Returns:
            In the units of the latents; 0 for a latent that never fired.
        """
        starts = self.counts.cumsum(0) - self.counts
        kept_from = starts + (_checked(share) * self.counts).long()
        # A latent without firings may point behind the last value: it gets a 0.
        padded = torch.cat([self.values, self.values.new_zeros(1)])
        return padded[kept_from] * (self.counts > 0)

    def share_of_maximum(self, share: float) -> float:
        """The share of each latent's maximum below which lies a share of all firings.

        Args:
            share: From 0 to below 1.
        """
        maxima = self.maxima.repeat_interleave(self.counts)
        return float(_lowest_kept(self.values / maxima, share))

    def lowest_per_token(self, share: float) -> int:
        """How many of a token's firings have to go so that a share of all firings does.

        Tokens that have fewer lose all they have. Of whole numbers it is the nearest.

        Args:
            share: From 0 to below 1.
        """
        tokens_with = torch.bincount(self.per_token).flip(0).cumsum(0).flip(0)[1:].double()
        removed = torch.cat([tokens_with.new_zeros(1), tokens_with.cumsum(0)])
        return int((removed - _checked(share) * self.per_token.sum()).abs().argmin())


def firings(batches: Iterable[Float[Tensor, "_ d_sae"]]) -> Firings:
    """Gather all activations above 0; they are kept, so memory grows with tokens times L0.

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
    """What is lowest when a share of the values, the lowest, has gone."""
    n_gone = int(_checked(share) * len(values))
    return values.kthvalue(n_gone + 1).values if len(values) else values.new_zeros(())


def _checked(share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"Expected argument `share` to be from 0 to below 1 but got {share}.")
    return share
