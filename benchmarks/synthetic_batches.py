"""Batches of synthetic activations: Gaussian noise, or sums of known features."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def gaussian_batches(
    n: int, batch_size: int, d_in: int, seed: int = 0
) -> list[Float[Tensor, "batch d_in"]]:
    """Batches of standard Gaussian activations, for timing where content does not matter.

    Example:
        >>> [batch.shape for batch in gaussian_batches(2, 3, 4)]
        [torch.Size([3, 4]), torch.Size([3, 4])]
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, d_in, generator=generator) for _ in range(n)]


def sparse_batches(
    n: int, batch_size: int, d_in: int, n_features: int, n_active: float, seed: int = 0
) -> list[Float[Tensor, "batch d_in"]]:
    """Batches of sums of a few features: random unit directions, strengths between 0.5 and 1.5.

    Args:
        n: Number of batches.
        batch_size: Activations in a batch.
        d_in: Width of the activations.
        n_features: Features in all, each as frequent as the others and independent of them.
        n_active: Features in an activation, on average.
        seed: Seed of the directions and of the activations.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(n_features, d_in, generator=generator), dim=-1)

    def batch() -> Tensor:
        draws = torch.rand(2, batch_size, n_features, generator=generator)
        strengths = torch.where(draws[0] < n_active / n_features, draws[1] + 0.5, 0.0)
        return strengths @ directions

    return [batch() for _ in range(n)]
