"""Other rules for which activations of a latent the orthogonality loss is over.

The loss of the source is over all pairs of an input and a latent that are not above the threshold,
silent ones included. The rules here choose among the pairs in which the latent fires. SAEs use them
with `orthogonality_side="high"`, whose loss is over the chosen pairs. For latents with two peaks
the threshold is the point between them, and the others have no loss; for `WeakOfShare` it is a
share of each latent's largest activation.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.peaks import MixtureThreshold, PeakThreshold
from lightning_sae.functional.sparse.code import Code

Chosen = Bool[Tensor, "..."]


class WeakOfShare(PeakThreshold):
    """Weak firings: those of up to a fixed share of the latent's largest activation."""

    @override
    def strong(self, f: Code, scale: float = 1.0) -> Chosen:
        """Which firings are weak."""
        return (f.values > 0) & ~super().strong(f, scale)


class OfTwoPeaks(MixtureThreshold, ABC):
    """Base of rules for latents with two peaks.

    Args:
        d_sae: Number of latents.
        window: Number of batches of a histogram.
        first: The rule is for so many first latents; for all by default.
    """

    def __init__(self, d_sae: int, window: int = 50, first: int | None = None) -> None:
        super().__init__(d_sae, 1.0, window)
        self.first = d_sae if first is None else first

    @override
    def strong(self, f: Code, scale: float = 1.0) -> Chosen:
        """Which firings are chosen; `scale` changes only the weight of their loss."""
        latents = torch.arange(len(self.has_two), device=self.has_two.device)
        applies = self.has_two & (latents < self.first)
        above = f.values > f.at(self.thresholds())
        # Codes hold floats only.
        low, ours = f.at(self.low_is_penalised().float()) > 0, f.at(applies.float()) > 0
        return ours & (f.values > 0) & (above ^ low)

    @abstractmethod
    def low_is_penalised(self) -> Bool[Tensor, " d_sae"]:
        """Whether the loss is over a latent's lower peak; else it is over its higher one."""


class LowPeak(OfTwoPeaks):
    """Firings of the lower peak, without silent inputs."""

    @override
    def low_is_penalised(self) -> Bool[Tensor, " d_sae"]:
        """All."""
        return torch.ones_like(self.has_two)


class HighPeak(OfTwoPeaks):
    """A latent's own top firings: those of the higher peak."""

    @override
    def low_is_penalised(self) -> Bool[Tensor, " d_sae"]:
        """None."""
        return torch.zeros_like(self.has_two)


class SmallPeak(OfTwoPeaks):
    """Firings of the peak that has fewer of them, chosen for each latent by itself."""

    @override
    def low_is_penalised(self) -> Bool[Tensor, " d_sae"]:
        """Where fewer firings lie below the point between the peaks than above it."""
        edges = torch.arange(1, self.bins + 1, device=self.shares.device) / self.bins
        below = (self.histogram * (edges <= self.shares[:, None])).sum(1)
        return below < self.histogram.sum(1) / 2
