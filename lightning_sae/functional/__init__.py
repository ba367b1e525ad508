"""The maths: pure functions of tensors, without state and without Lightning."""

from lightning_sae.functional.language_modelling import (
    kl_divergence,
    loss_recovered,
    next_token_cross_entropy,
    perplexity,
)
from lightning_sae.functional.reconstruction import (
    cosine_similarity,
    explained_variance,
    fvu,
    l2_ratio,
    mse,
    relative_reconstruction_bias,
)
from lightning_sae.functional.sparsity import (
    dead_fraction,
    feature_frequency,
    frequency_below,
    l0,
)

__all__ = [
    "cosine_similarity",
    "dead_fraction",
    "explained_variance",
    "feature_frequency",
    "frequency_below",
    "fvu",
    "kl_divergence",
    "l0",
    "l2_ratio",
    "loss_recovered",
    "mse",
    "next_token_cross_entropy",
    "perplexity",
    "relative_reconstruction_bias",
]
