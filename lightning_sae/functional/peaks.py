r"""Peaks in the distribution of a latent's activations.

The activations of a latent that mixes features have several peaks: a high one where its main
feature fires, and low ones where only others do. `two_peaks` fits two normal components to each
latent's histogram,

.. math::
    p(a) = \pi_1 N(a; \mu_1, \sigma_1^2) + \pi_2 N(a; \mu_2, \sigma_2^2), \quad \mu_1 < \mu_2

by expectation-maximization, starting from Otsu's split (largest variance between the halves). The
crossing is the activation between the means that is equally likely under both. The separation is
Ashman's :math:`D = \sqrt 2\, (\mu_2 - \mu_1) / \sqrt{\sigma_1^2 + \sigma_2^2}`; above 2 the
peaks are clearly separate. Sources: Otsu, A threshold selection method from gray-level histograms
(1979); Ashman et al., Detecting bimodality in astronomical datasets (1994), for D.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.patterns import DensePattern, SparsePattern

LEAST_COUNT = 100.0  # activations that a histogram needs for a fit
LEAST_SHARE = 0.05  # smallest share of a component; smaller ones may be outliers
LEAST_WIDTH = 1 / 32  # smallest standard deviation, in units of the histogram's width
CLEARLY_TWO = 2.0  # Ashman's D above which there are two peaks


def maxima(f: Code) -> Float[Tensor, " d_sae"]:
    """Largest activation of each latent in a batch; 0 if it does not fire.

    Example:
        >>> maxima(Code.of_matrix(torch.tensor([[0.0, 2.0], [0.0, 3.0]])))
        tensor([0., 3.])
    """
    values, pattern = f.values.detach(), f.pattern
    if isinstance(pattern, SparsePattern):
        found = values.new_zeros(pattern.shape[1])
        return found.scatter_reduce_(0, pattern.latents.long(), values, "amax")
    return values.amax(0).clamp_min(0.0) if len(values) else values.new_zeros(pattern.shape[1])


def counts_by_height(
    f: Code, tops: Float[Tensor, " d_sae"], bins: int
) -> Int[Tensor, "d_sae bins"]:
    """Histogram of each latent's activations, in bins of equal width from 0 to its top.

    Activations above the top count in the last bin. Latents whose top is 0 are not counted.

    Example:
        >>> f = Code.of_matrix(torch.tensor([[1.0], [3.5], [5.0], [0.0]]))
        >>> counts_by_height(f, torch.tensor([4.0]), bins=4)
        tensor([[0, 1, 0, 2]])
    """
    latents, values = _active(f)
    of_each = tops.index_select(0, latents)
    kept = of_each > 0
    latents, heights = latents[kept], values[kept] / of_each[kept]
    places = latents * bins + (heights * bins).long().clamp_max(bins - 1)
    return torch.bincount(places, minlength=len(tops) * bins).view(len(tops), bins)


def _active(f: Code) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    values, pattern = f.values.detach(), f.pattern
    fires = values > 0
    if isinstance(pattern, DensePattern):
        return fires.nonzero(as_tuple=True)[1], values[fires]
    return pattern.latents[fires].long(), values[fires]


class TwoPeaks(NamedTuple):
    """Result of a fit of two components, for each latent.

    Attributes:
        crossing: Where both components are equally likely, as a share of the histogram's width;
            meaningless for latents without two peaks.
        separation: Ashman's D; 0 where no fit was possible.
        found: Whether there are two peaks.
    """

    crossing: Float[Tensor, " d_sae"]
    separation: Float[Tensor, " d_sae"]
    found: Bool[Tensor, " d_sae"]


class _Component(NamedTuple):
    """One of the two components of each latent, each [d_sae]."""

    share: Tensor
    mean: Tensor
    variance: Tensor

    def log_density(self) -> Float[Tensor, "d_sae 3"]:
        """Coefficients of 1, a and a^2 in log(share * density), up to a constant."""
        constant = self.share.log() - self.variance.log() / 2 - self.mean**2 / self.variance / 2
        return torch.stack([constant, self.mean / self.variance, -1 / self.variance / 2], dim=1)


def two_peaks(histogram: Float[Tensor, "d_sae bins"], iterations: int = 20) -> TwoPeaks:
    """Fit two normal components to the histogram of each latent.

    There are two peaks if D is above 2, each component has at least 5 % of the activations, and
    there are at least 100 activations. Standard deviations are at least 1/32.

    Args:
        histogram: Counts, not necessarily whole, in bins of equal width from 0 to 1.
        iterations: Iterations of expectation-maximization.
    """
    centres = _centres(histogram)
    upper = (centres > otsu_split(histogram).unsqueeze(1)).to(histogram.dtype)
    powers = centres.unsqueeze(1) ** torch.arange(3, device=centres.device)
    for _ in range(iterations):
        high = _fitted(histogram, upper, powers)
        low = _fitted(histogram, 1 - upper, powers)
        lead = (high.log_density() - low.log_density()) @ powers.T
        upper = torch.sigmoid(lead.clamp(-30, 30))  # denormal products beyond this are slow
    crossing, crosses = _crossing(low, high)
    spread = (low.variance + high.variance).sqrt()
    enough = torch.minimum(low.share, high.share) >= LEAST_SHARE
    enough &= histogram.sum(1) >= LEAST_COUNT
    separation = torch.where(enough, 2**0.5 * (high.mean - low.mean) / spread, 0.0)
    return TwoPeaks(crossing, separation, crosses & (separation > CLEARLY_TWO))


def otsu_split(histogram: Float[Tensor, "d_sae bins"]) -> Float[Tensor, " d_sae"]:
    """Otsu's threshold: the bin edge, from 0 to 1, of largest between-class variance.

    Example:
        >>> otsu_split(torch.tensor([[5.0, 4.0, 0.0, 7.0]]))
        tensor([0.5000])
    """
    centres = _centres(histogram)
    below, moment = histogram.cumsum(1), (histogram * centres).cumsum(1)
    n, m = below[:, -1:], moment[:, -1:]
    between = (m * below - n * moment) ** 2 / (below * (n - below)).clamp_min(1e-12)
    return (between[:, :-1].argmax(1) + 1) / histogram.shape[1]


def _centres(histogram: Float[Tensor, "d_sae bins"]) -> Float[Tensor, " bins"]:
    bins = histogram.shape[1]
    return (torch.arange(bins, device=histogram.device, dtype=histogram.dtype) + 0.5) / bins


def _fitted(histogram: Tensor, members: Tensor, powers: Tensor) -> _Component:
    """The component that has the share `members` of each bin, from its moments."""
    n, first, second = ((histogram * members) @ powers).clamp_min(1e-6).unbind(1)
    mean = first / n
    variance = (second / n - mean**2).clamp_min(LEAST_WIDTH**2)
    return _Component(n / histogram.sum(1).clamp_min(1e-6), mean, variance)


def _crossing(low: _Component, high: _Component) -> tuple[Tensor, Tensor]:
    """The crossing between the means, by bisection, and whether there is one."""
    constant, slope, curve = (high.log_density() - low.log_density()).unbind(1)

    def low_leads(at: Tensor) -> Tensor:
        return constant + (slope + curve * at) * at < 0

    left, right = low.mean, high.mean
    crosses = (left < right) & low_leads(left) & ~low_leads(right)
    for _ in range(20):
        middle = (left + right) / 2
        leads = low_leads(middle)
        left, right = torch.where(leads, middle, left), torch.where(leads, right, middle)
    return (left + right) / 2, crosses
