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
from lightning_sae.studies.shared.peaks import PEAK_BINS, count_peaks, histogram, overlap

SAMPLES = 2**17
FAINT = 0.01  # share of the SAE's largest activation; anything below counts as interference
RARE = 0.001  # share of samples on which a latent must fire to be alive


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
    norms = sae.penalty_norms()
    sizes = f if norms is None else f * norms  # of what latents add to the reconstruction
    fires = sizes > FAINT * sizes.max()
    kept = torch.where(fires, sizes, 0.0)
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
