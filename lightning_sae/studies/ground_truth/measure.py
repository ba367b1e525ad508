"""Figures of an SAE on activations whose features are known."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.data import ToyDataModule
from lightning_sae.data.toy.stream import seed_of
from lightning_sae.functional.matching import cosine_matrix, mean_correlation_coefficient
from lightning_sae.metrics import held_out_metrics
from lightning_sae.metrics.ground_truth import ground_truth_metrics

HELD_OUT = 65_536
CHUNK = 4096
FOUND = 0.9  # |cosine| from which a feature counts as found


def held_out(data: ToyDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out activations [chunk, d_in] and their magnitudes [chunk, n_features]."""
    generator = torch.Generator().manual_seed(seed_of(data.seed, "study"))
    for _ in range(HELD_OUT // CHUNK):
        sample = data.sample(CHUNK, generator)
        yield sample.x, sample.magnitudes


@torch.no_grad()
def measure(
    sae: Any,
    samples: Iterable[tuple[Tensor, Tensor]],
    features: Float[Tensor, "n_features d_in"],
    pairs: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Figures of an SAE on activations whose features are known.

    Args:
        sae: Anything with `W_dec`, `encode` and `decode`, on raw activations.
        samples: Pairs of activations and magnitudes.
        features: Directions.
        pairs: Pairs of a parent and a child, at least one.
    """
    reconstruction = held_out_metrics(features.shape[1], len(sae.W_dec))
    known = ground_truth_metrics(sae.W_dec, features, pairs)
    fires, n = 0, 0
    for x, magnitudes in samples:
        f = sae.encode(x)
        reconstruction.update(x=x, x_hat=sae.decode(f), f=f)
        known.update(f=f, magnitudes=magnitudes)
        fires, n = fires + int(magnitudes.count_nonzero()), n + len(x)
    best = cosine_matrix(sae.W_dec, features).abs().amax(0)
    figures: dict[str, Any] = {
        "true_l0": fires / n,
        "mcc": mean_correlation_coefficient(sae.W_dec, features),
        "found": (best >= FOUND).double().mean(),
        **_of_reconstruction(reconstruction.compute()),
        **_of_latents(known.compute()),
    }
    return {name: float(value) for name, value in figures.items()}


def _of_reconstruction(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "l0": found["l0"],
        "fvu": found["fvu"],
        "relative_reconstruction_bias": found["relative_reconstruction_bias"],
        "dead": found["dead_fraction"],
    }


def _of_latents(known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over latents; latents without a figure are left out, and count 0 in F1."""
    return {
        "f1": known["f1"].nan_to_num().mean(),
        "precision": known["precision"].nanmean(),
        "recall": known["recall"].nanmean(),
        "shrinkage": known["shrinkage"].nanmedian(),
        "duplicates": known["duplicate_fraction"],
        "absorption": known["absorption"].nanmean(),
        "absorption_baseline": known["absorption_baseline"].nanmean(),
    }
