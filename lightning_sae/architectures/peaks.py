"""Thresholds of latents from their largest activations over the last batches."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.functional.peaks import counts_by_height, maxima, two_peaks
from lightning_sae.functional.sparse.code import Code

Reduce = Callable[..., Tensor]
"""Reduces a tensor over ranks, possibly in place, as `reduce` of a trainer's strategy does."""


class PeakThreshold(nn.Module):
    """A fixed share of each latent's largest activation over the last batches.

    A batch is the input of one training step: a micro-batch if gradients are accumulated, and the
    batches of all ranks together. The current batch counts only after its end, so that the
    threshold is the same for all its chunks of rows. All state is in buffers and is the same on all
    ranks.

    Args:
        d_sae: Number of latents.
        share: Share of the largest activation.
        window: Number of batches.
    """

    recent: Float[Tensor, "window d_sae"]
    n_batches: Int[Tensor, ""]
    current: Float[Tensor, " d_sae"]

    def __init__(self, d_sae: int, share: float, window: int) -> None:
        super().__init__()
        self.share, self.window = share, window
        self.register_buffer("recent", torch.zeros(window, d_sae))
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("current", torch.zeros(d_sae), persistent=False)

    def peaks(self) -> Float[Tensor, " d_sae"]:
        """The largest activation of each latent over the window; 0 before the first batch."""
        return self.recent.amax(0)

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """The threshold of each latent."""
        return self.share * self.peaks()

    def strong(self, f: Code, scale: float = 1.0) -> Bool[Tensor, "..."]:
        """Which activations are above the threshold times `scale`, in the shape of `f.values`."""
        return f.values.detach() > f.at(scale * self.thresholds())

    def open(self) -> None:
        """Begin a batch."""
        self.current.zero_()

    @torch.no_grad()
    def note(self, f: Code) -> None:
        """Add latents of the batch, for all or some of its rows."""
        torch.maximum(self.current, maxima(f), out=self.current)

    @torch.no_grad()
    def close(self, reduce: Reduce) -> None:
        """End a batch, on all ranks."""
        place = (self.n_batches % self.window).view(1)
        seen = reduce(self.current.clone(), reduce_op="max")  # may work in place
        self.recent.index_copy_(0, place, seen.unsqueeze(0))
        self.n_batches += 1

    def scalars(self) -> dict[str, Float[Tensor, ""]]:
        """Values to log, by name."""
        return {}


class MixtureThreshold(PeakThreshold):
    """The point between a latent's two peaks of activation; the fixed share if it has one peak.

    Activations are counted in bins from 0 to the largest over the window, and counts decay by the
    factor 1 - 1 / `window` per batch. Every `window` batches, `two_peaks` is fitted to them. The
    point where the two peaks cross is stored relative to the largest activation, which may change
    until the next fit.

    Args:
        d_sae: Number of latents.
        share: Share of the largest activation, for latents without two peaks.
        window: Number of batches.
        bins: Bins of the histogram.
    """

    histogram: Float[Tensor, "d_sae bins"]
    counted: Float[Tensor, "d_sae bins"]
    shares: Float[Tensor, " d_sae"]
    separation: Float[Tensor, " d_sae"]
    has_two: Bool[Tensor, " d_sae"]

    def __init__(self, d_sae: int, share: float, window: int, bins: int = 64) -> None:
        super().__init__(d_sae, share, window)
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(d_sae, bins))
        self.register_buffer("counted", torch.zeros(d_sae, bins), persistent=False)
        self.register_buffer("shares", torch.full((d_sae,), share))
        self.register_buffer("separation", torch.zeros(d_sae))
        self.register_buffer("has_two", torch.zeros(d_sae, dtype=torch.bool))

    @override
    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """The threshold of each latent."""
        return self.shares * self.peaks()

    @override
    def open(self) -> None:
        """Begin a batch."""
        super().open()
        self.counted.zero_()

    @override
    def note(self, f: Code) -> None:
        """Add latents of the batch, for all or some of its rows."""
        super().note(f)
        self.counted += counts_by_height(f, self.peaks(), self.bins)

    @override
    @torch.no_grad()
    def close(self, reduce: Reduce) -> None:
        """End a batch, on all ranks, and fit every `window` batches."""
        super().close(reduce)
        self.histogram *= 1 - 1 / self.window
        self.histogram += reduce(self.counted.clone(), reduce_op="sum")
        if self.n_batches % self.window == 0:
            self._fit()

    def _fit(self) -> None:
        crossing, separation, found = two_peaks(self.histogram)
        self.shares.copy_(torch.where(found, crossing, self.share))
        self.separation.copy_(separation)
        self.has_two.copy_(found)

    @override
    def scalars(self) -> dict[str, Float[Tensor, ""]]:
        """Mean separation of the peaks, and the share of latents that have two."""
        return {"separation": self.separation.mean(), "two_peaks": self.has_two.float().mean()}
