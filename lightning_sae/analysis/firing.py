"""Statistics of how strongly each latent fires, from one pass over activations.

Everything here is a sum, a maximum or a selection by a fixed order, so merging the results of
several ranks gives the result of a single rank. Memory grows with the number of latents and the
items kept for each, not with the number of tokens.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PER_OCTAVE = 16  # bins of the histogram between an activation and twice that activation
LOWEST = -24  # octaves from the reference to the lowest bin
HIGHEST = 8
BINS = (HIGHEST - LOWEST) * PER_OCTAVE


class Firings(NamedTuple):
    """The non-zero latents of some tokens; all tensors [n].

    Attributes:
        token: Index of the token in the text, which consists of blocks of equal length.
        latent: Index of the latent.
        value: Its activation, in units of the raw activations.
    """

    token: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


class Strengths:
    """Counts, sums and histograms of each latent's activations.

    Histograms have bins of equal width in the logarithm, `PER_OCTAVE` per octave, so the largest
    activation need not be known beforehand. Quantiles are exact to the width of a bin, 4 %.

    Args:
        d_sae: Number of latents.
        reference: A typical activation; bins range from 2^-24 to 2^8 times it, and values beyond
            are counted in the outermost bins.
    """

    def __init__(self, d_sae: int, reference: float) -> None:
        self.d_sae, self.reference = d_sae, reference
        self.n_tokens = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.squares = torch.zeros(d_sae, dtype=torch.float64)
        self.largest = torch.zeros(d_sae)
        self.bins = torch.zeros(d_sae, BINS, dtype=torch.int32)

    def update(self, firings: Firings, n_tokens: int) -> None:
        """Add the latents of `n_tokens` tokens."""
        latent, value = firings.latent, firings.value.float()
        self.n_tokens += n_tokens
        self.count += torch.bincount(latent, minlength=self.d_sae)
        self.total.index_add_(0, latent, value.double())
        self.squares.index_add_(0, latent, value.double().square())
        self.largest.scatter_reduce_(0, latent, value, "amax")
        octaves = (value / self.reference).log2() - LOWEST
        bins = (octaves * PER_OCTAVE).long().clamp(0, BINS - 1)
        ones = torch.ones_like(latent, dtype=torch.int32)
        self.bins.view(-1).index_add_(0, latent * BINS + bins, ones)

    def merge(self, other: "Strengths") -> None:
        """Add the statistics of another rank."""
        self.n_tokens += other.n_tokens
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.largest = torch.maximum(self.largest, other.largest)
        self.bins += other.bins

    def edges(self) -> Float[Tensor, " edges"]:
        """Edges of the bins, one more than there are bins."""
        octaves = torch.arange(BINS + 1, dtype=torch.float64) / PER_OCTAVE + LOWEST
        return self.reference * 2**octaves

    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each latent fires."""
        return self.count / max(1, self.n_tokens)

    def mean(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of each latent where it fires; NaN if it never fires."""
        return self.total / self.count

    def std(self) -> Float[Tensor, " d_sae"]:
        """Standard deviation of each latent where it fires; NaN if it never fires."""
        return (self.squares / self.count - self.mean().square()).clamp_min(0).sqrt()

    def quantile(self, share: float) -> Float[Tensor, " d_sae"]:
        """Activation below which this share of a latent's firings lie; NaN if it never fires."""
        below = self.bins.cumsum(1)
        place = (below >= (share * self.count).unsqueeze(1)).int().argmax(1)
        middle = (self.edges()[:-1] * self.edges()[1:]).sqrt()[place]
        found = torch.minimum(middle, self.largest.double())
        return torch.where(self.count > 0, found, torch.nan)

    def histogram(self, bins: int) -> Float[Tensor, "d_sae {bins}"]:
        """Firings in bins of equal width from 0 to each latent's largest activation.

        The firings of a logarithmic bin are spread evenly over its width.
        """
        edges = self.edges()
        starts, widths = edges[:-1], edges.diff()
        found = torch.zeros(self.d_sae, bins, dtype=torch.float64)
        for i, (counts, top) in enumerate(zip(self.bins, self.largest.double(), strict=True)):
            some = counts.nonzero().squeeze(1)
            if len(some) == 0:
                continue
            # Share of each logarithmic bin that lies below each edge of the even ones.
            even = torch.arange(1, bins + 1, dtype=torch.float64) / bins * top
            low = torch.minimum(starts[some], top * (1 - 1e-6))  # for rounding
            high = torch.minimum(starts[some] + widths[some], top)
            share = (even.unsqueeze(1) - low) / (high - low)
            below = (share.clamp(0, 1) * counts[some]).sum(1)
            found[i] = below.diff(prepend=below.new_zeros(1))
        return found.float()


class Contexts:
    """For each latent, the tokens on which it fires most strongly, and a sample of each interval.

    The strongest firings come from different blocks of text. Intervals are octaves of activation:
    from each, `per_interval` firings are drawn with equal probability (the same one may be drawn
    twice). The draw uses a hash of token and latent, so it does not depend on the number of ranks.

    Args:
        d_sae: Number of latents.
        n_top: Strongest firings kept for each latent.
        per_interval: Firings drawn from each octave.
        reference: A typical activation; octaves are kept from 2^-12 to 2^4 times it.
    """

    OCTAVES = 16

    def __init__(self, d_sae: int, n_top: int, per_interval: int, reference: float) -> None:
        self.d_sae, self.reference = d_sae, reference
        self.top_values = torch.zeros(d_sae, n_top)
        self.top_tokens = torch.full((d_sae, n_top), -1, dtype=torch.int64)
        slots = (per_interval, d_sae * self.OCTAVES)
        self.keys = torch.full(slots, -1, dtype=torch.int64)
        self.drawn_values = torch.zeros(slots)
        self.drawn_tokens = torch.full(slots, -1, dtype=torch.int64)

    def update(self, firings: Firings, block_length: int) -> None:
        """Add the latents of some blocks of text."""
        if len(firings.value):
            self._update_top(firings, block_length)
            self._update_drawn(firings)

    def _update_top(self, firings: Firings, block_length: int) -> None:
        block = firings.token // block_length
        first = int(block.min())
        shape = (self.d_sae, int(block.max()) - first + 1)
        place = firings.latent * shape[1] + (block - first)
        values = torch.zeros(shape).view(-1)
        values.scatter_reduce_(0, place, firings.value.float(), "amax")
        # Among equal activations in a block, the first.
        strongest = firings.value.float() == values[place]
        tokens = torch.full((len(values),), torch.iinfo(torch.int64).max)
        tokens.scatter_reduce_(0, place[strongest], firings.token[strongest], "amin")
        self._keep_top(values.view(shape), tokens.view(shape))

    def _keep_top(self, values: Tensor, tokens: Tensor) -> None:
        n_top = self.top_values.shape[1]
        values = torch.cat([self.top_values, values], 1)
        tokens = torch.cat([self.top_tokens, tokens], 1)
        by_token = tokens.argsort(1)  # among equal activations, the first one read
        order = values.gather(1, by_token).argsort(dim=1, descending=True, stable=True)
        order = by_token.gather(1, order)[:, :n_top]
        self.top_values, self.top_tokens = values.gather(1, order), tokens.gather(1, order)
        self.top_tokens[self.top_values == 0] = -1

    def _update_drawn(self, firings: Firings) -> None:
        octaves = (firings.value.float() / self.reference).log2().floor().long() + 12
        slot = firings.latent * self.OCTAVES + octaves.clamp(0, self.OCTAVES - 1)
        for draw in range(len(self.keys)):
            key = hashed(firings.token, firings.latent, draw)
            new = self.keys[draw].scatter_reduce(0, slot, key, "amax")
            won = (key == new[slot]) & (key > self.keys[draw][slot])
            self.drawn_values[draw][slot[won]] = firings.value.float()[won]
            self.drawn_tokens[draw][slot[won]] = firings.token[won]
            self.keys[draw] = new

    def merge(self, other: "Contexts") -> None:
        """Merge the contexts of another rank."""
        self._keep_top(other.top_values, other.top_tokens)
        won = other.keys > self.keys
        self.keys = torch.maximum(self.keys, other.keys)
        self.drawn_values = torch.where(won, other.drawn_values, self.drawn_values)
        self.drawn_tokens = torch.where(won, other.drawn_tokens, self.drawn_tokens)

    def chosen(self) -> dict[str, Tensor]:
        """All kept firings, each once, ordered by latent, the strongest first.

        Returns:
            `latent`, `token`, `value`, and `interval`: 0 for the strongest firings, otherwise 1 for
            activations above half of the latent's largest, 2 above a quarter, and so on; all [n].
        """
        d_sae, n_top = self.top_values.shape
        latents = torch.arange(d_sae)
        drawn = latents.repeat_interleave(self.OCTAVES).expand_as(self.drawn_values)
        latent = torch.cat([latents.repeat_interleave(n_top), drawn.reshape(-1)])
        value = torch.cat([self.top_values.view(-1), self.drawn_values.view(-1)])
        token = torch.cat([self.top_tokens.view(-1), self.drawn_tokens.view(-1)])
        is_top = torch.arange(len(latent)) < d_sae * n_top
        below = (self.top_values[:, 0][latent] / value).log2().floor() + 1
        interval = torch.where(is_top, 0, below.nan_to_num(0, 0, 0).long().clamp_min(1))
        kept = token >= 0
        found = {"latent": latent, "token": token, "value": value, "interval": interval}
        found = {name: each[kept] for name, each in found.items()}
        return _without_repeats(found)


def _without_repeats(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each latent and token once, with the lower interval; by latent, interval and value."""
    order = torch.arange(len(found["value"]))
    for name, descending in (("token", False), ("value", True), ("interval", False)):
        order = order[found[name][order].argsort(stable=True, descending=descending)]
    order = order[found["latent"][order].argsort(stable=True)]
    found = {name: each[order] for name, each in found.items()}
    pairs, inverse = (found["latent"] * 2**40 + found["token"]).unique(return_inverse=True)
    first = torch.full((len(pairs),), len(inverse))
    first.scatter_reduce_(0, inverse, torch.arange(len(inverse)), "amin")
    kept = first.sort().values
    return {name: each[kept] for name, each in found.items()}


def hashed(token: Int[Tensor, " n"], latent: Int[Tensor, " n"], draw: int) -> Int[Tensor, " n"]:
    """Pseudo-random integers from 0 to 2^62, the same for the same arguments (splitmix64)."""
    x = token * 0x1E3779B97F4A7C15 + latent * 0x3F58476D1CE4E5B9 + (draw + 1) * 0x14D049BB133111EB
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)


class PairCounts:
    """How often each latent co-occurs with partners: tokens, or other latents.

    Counts are exact while a latent has few partners. When there are too many, each latent keeps its
    highest-ranked partners, and a dropped partner that returns counts from zero.

    Args:
        n_partners: Number of possible partners.
        by: Ranking of a latent's partners: by `counts`, or by `sums` of its activations.
        keep: Partners that each latent keeps when pairs are dropped.
        limit: Number of pairs above which pairs are dropped.
    """

    def __init__(
        self,
        n_partners: int,
        by: Literal["counts", "sums"] = "counts",
        keep: int = 64,
        limit: int = 2_000_000,
    ) -> None:
        self.n_partners, self.by, self.keep, self.limit = n_partners, by, keep, limit
        self.pairs = torch.zeros(0, dtype=torch.int64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(
        self, latent: Int[Tensor, " n"], partner: Int[Tensor, " n"], value: Float[Tensor, " n"]
    ) -> None:
        """Count pairs, and sum their values."""
        pairs, inverse = (latent * self.n_partners + partner).unique(return_inverse=True)
        counts = torch.bincount(inverse, minlength=len(pairs))
        sums = torch.zeros(len(pairs), dtype=torch.float64)
        self._waiting.append((pairs, counts, sums.index_add_(0, inverse, value.double())))
        if sum(len(pairs) for pairs, *_ in self._waiting) > max(self.limit // 4, len(self.pairs)):
            self._tidy()

    def merge(self, other: "PairCounts") -> None:
        """Add the counts of another rank."""
        other._tidy()
        self._waiting.append((other.pairs, other.counts, other.sums))
        self._tidy()

    def _tidy(self) -> None:
        parts = [(self.pairs, self.counts, self.sums), *self._waiting]
        pairs, counts, sums = (torch.cat(each) for each in zip(*parts, strict=True))
        self._waiting = []
        self.pairs, inverse = pairs.unique(return_inverse=True)
        n = len(self.pairs)
        self.counts = torch.zeros(n, dtype=torch.int64).index_add_(0, inverse, counts)
        self.sums = torch.zeros(n, dtype=torch.float64).index_add_(0, inverse, sums)
        if n > self.limit:
            kept = self._ranks() < self.keep
            self.pairs, self.counts = self.pairs[kept], self.counts[kept]
            self.sums = self.sums[kept]

    def _ranks(self) -> Int[Tensor, " pairs"]:
        """Rank of each pair among those of its latent."""
        latent = self.pairs // self.n_partners
        ranked = self.counts if self.by == "counts" else self.sums
        order = ranked.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        starts = torch.searchsorted(latent[order], latent[order])
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order)) - starts
        return ranks

    def first(self, d_sae: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Top partners of each latent, counts and mean values, each [d_sae, n]; -1 for none."""
        self._tidy()
        ranks = self._ranks()
        kept = ranks < n
        place = (self.pairs // self.n_partners)[kept], ranks[kept]
        partners = torch.full((d_sae, n), -1, dtype=torch.int64)
        counts, means = torch.zeros(d_sae, n, dtype=torch.int64), torch.zeros(d_sae, n)
        partners[place] = (self.pairs % self.n_partners)[kept]
        counts[place] = self.counts[kept]
        means[place] = (self.sums / self.counts)[kept].float()
        return partners, counts, means


def together(firings: Firings, most: int = 1_000_000) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of different latents that fire on a token.

    Args:
        firings: Latents of some tokens, token by token.
        most: Maximum number of pairs; tokens beyond it are left out, chosen by a hash of their
            index.

    Returns:
        First latent, second latent, and the activation of the first; each [pairs].
    """
    tokens, n = firings.token.unique_consecutive(return_counts=True)
    order = hashed(tokens, tokens, 0).argsort()
    kept = torch.zeros(len(tokens), dtype=torch.bool)
    kept[order[n[order].square().cumsum(0) <= most]] = True
    of_kept = kept.repeat_interleave(n)
    latent, value, n = firings.latent[of_kept], firings.value[of_kept], n[kept]
    each = n.repeat_interleave(n)  # pairs of each firing, itself included
    one = torch.arange(len(latent)).repeat_interleave(each)
    start = (n.cumsum(0) - n).repeat_interleave(n).repeat_interleave(each)
    within = torch.arange(len(one)) - (each.cumsum(0) - each).repeat_interleave(each)
    other = start + within
    different = one != other
    one, other = one[different], other[different]
    return latent[one], latent[other], value[one]
