"""Compare the latents of a trained SAE with the features of its toy data.

Cosines tell which directions latents have, activations on held-out samples when they fire. The
activations of a latent that mixes features have several peaks: a high one where its main feature
fires and low ones where only the others do.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data.toy.datamodule import ToyDataModule, ToySample
from lightning_sae.functional.ground_truth import absorption
from lightning_sae.functional.matching import best_latents, cosine_matrix, parent_in_child

SAMPLES = 2**17
FAINT = 0.01  # share of the SAE's largest activation; anything below counts as interference
RARE = 0.001  # share of samples on which a latent must fire to be alive
BINS = 100  # of a latent's histogram, from 0 to its largest activation
PEAK_BINS = 25  # of the histogram whose peaks are counted
LOWEST = 0.15  # share of a latent's largest activation from which its peaks are counted
DIP = 0.5  # share of the lower of two peaks to which counts between them have to fall
LEAST = 0.01  # share of a latent's activations that make a peak


@dataclass(frozen=True)
class Measured:
    """An SAE's latents against the features.

    Attributes:
        decoder: Cosines of decoder rows with features.
        encoder: Cosines of encoder columns with features.
        frequency: Share of samples on which each latent fires, faint activations left out.
        peaks: Peaks of each latent's activations.
        overlap: Common area, from 0 to 1, of the distributions of a latent's activations where its
            feature fires and where it does not.
        parent_silent: Of the first pair of a parent and a child: share of the samples with both on
            which the parent's latent is silent; None where there is no pair.
        parent_silent_alone: The same where the child does not fire.
        parent_in_child: Cosine of the child's latent with the parent; None without a pair.
        squared_error: Mean over samples, summed over d_in.
        l0: Mean number of latents that fire on a sample, faint activations left out.
    """

    decoder: Float[Tensor, "d_sae n_features"]
    encoder: Float[Tensor, "d_sae n_features"]
    frequency: Float[Tensor, " d_sae"]
    peaks: Int[Tensor, " d_sae"]
    overlap: Float[Tensor, " d_sae"]
    parent_silent: float | None
    parent_silent_alone: float | None
    parent_in_child: float | None
    squared_error: float
    l0: float

    @property
    def best(self) -> Float[Tensor, " d_sae"]:
        """The largest |cosine| of each latent's decoder row with a feature."""
        return self.decoder.abs().amax(1)

    @property
    def features(self) -> Int[Tensor, " d_sae"]:
        """The feature of that cosine."""
        return self.decoder.abs().argmax(1)

    @property
    def alive(self) -> Bool[Tensor, " d_sae"]:
        """Which latents fire on at least one of a thousand samples."""
        return self.frequency >= RARE


@torch.no_grad()
def measure(
    sae: SparseAutoencoder, world: ToyDataModule, sample: ToySample, f: Float[Tensor, "n d_sae"]
) -> Measured:
    """Compare an SAE with its toy data.

    Args:
        sae: The SAE.
        world: The toy data that it was trained on.
        sample: Held-out activations with their features.
        f: Its latents on the sample.
    """
    fires = f > FAINT * f.max()
    kept = torch.where(fires, f, 0.0)
    decoder = cosine_matrix(sae.W_dec, world.features)
    with_feature = sample.magnitudes[:, decoder.abs().argmax(1)] > 0
    silent = silent_alone = inside = None
    if world.pairs:
        pair = torch.tensor(world.pairs[:1])
        latents = best_latents(sae.W_dec, world.features)
        silent = absorption(kept, sample.magnitudes, pair, latents).item()
        silent_alone = absorption(kept, sample.magnitudes, pair, latents, with_child=False).item()
        inside = parent_in_child(sae.W_dec, world.features, pair).item()
    return Measured(
        decoder=decoder,
        encoder=cosine_matrix(sae.W_enc.T, world.features),
        frequency=fires.float().mean(0),
        peaks=torch.tensor([count_peaks(histogram(column, PEAK_BINS)) for column in kept.T]),
        overlap=torch.tensor([overlap(*pair) for pair in zip(kept.T, with_feature.T, strict=True)]),
        parent_silent=silent,
        parent_silent_alone=silent_alone,
        parent_in_child=inside,
        squared_error=(sae.decode(f) - sample.x).square().sum(-1).mean().item(),
        l0=fires.float().sum(-1).mean().item(),
    )


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
