"""Peaks of a latent's activations, and how much they overlap with and without a feature."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BINS = 100  # of a latent's histogram, from 0 to its largest activation
PEAK_BINS = 25  # of the histogram whose peaks are counted
LOWEST = 0.15  # share of a latent's largest activation from which its peaks are counted
DIP = 0.5  # share of the lower of two peaks to which counts between them have to fall
LEAST = 0.01  # share of a latent's activations that make a peak


def histogram(f: Float[Tensor, " n"], bins: int = BINS) -> Float[Tensor, " bins"]:
    """Counts of one latent's activations above 0, in bins of equal width up to its largest.

    Example:
        >>> histogram(torch.tensor([0.0, 1.0, 3.9, 4.0]), bins=4)
        tensor([0., 1., 0., 2.])
    """
    top = f.max().item()
    if top <= 0:
        return torch.zeros(bins)
    return torch.histc(f[f > 0], bins, 0.0, top)


def overlap(f: Float[Tensor, " n"], with_feature: Bool[Tensor, " n"]) -> float:
    """Common area of the distributions of one latent's activations with a feature and without it.

    Samples on which the latent is silent do not count. 0 if there are no others on one side.

    Example:
        >>> f = torch.tensor([4.0, 4.0, 1.0, 1.0, 1.0, 4.0, 0.0])
        >>> overlap(f, torch.tensor([True, True, False, False, False, False, False]))
        0.25
    """
    top = f.max().item()
    sides = [f[with_feature & (f > 0)], f[~with_feature & (f > 0)]]
    if not all(map(len, sides)):
        return 0.0
    a, b = (torch.histc(side, BINS, 0.0, top) / len(side) for side in sides)
    return torch.minimum(a, b).sum().item()


def count_peaks(counts: Float[Tensor, " bins"]) -> int:
    """Peaks of a histogram that begins at 0.

    Two peaks are separate if counts between them fall to half of the lower one or less. A peak
    counts if 1 % of all counts lie in it, from dip to dip. The lowest 15 % of the histogram are
    left out, since interference of features and the effect of `b_dec` lie there.

    Example:
        >>> count_peaks(torch.tensor([0.0, 5.0, 9.0, 5.0, 1.0, 6.0, 4.0]))
        2
    """
    kept = counts.clone()
    kept[: round(LOWEST * len(counts))] = 0
    return sum(mass >= LEAST * kept.sum().item() for mass in _masses(kept.tolist()))


def _masses(counts: list[float]) -> list[float]:
    """The sum of counts in each stretch between two dips; empty for a histogram of zeros."""
    masses, mass, top, bottom = [], 0.0, 0.0, 0.0
    falling = False
    for count in counts:
        if falling and DIP * count >= bottom and count > 0:
            masses.append(mass)
            mass, top, falling = 0.0, count, False
        mass, top, bottom = mass + count, max(top, count), min(bottom, count)
        if not falling and count <= DIP * top and top > 0:
            falling, bottom = True, count
    return [*masses, mass] if mass else masses
