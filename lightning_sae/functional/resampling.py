"""New directions for latents that have died.

Sources: "by loss" is the scheme of Bricken et al., Towards Monosemanticity (2023), appendix
"Advice for training sparse autoencoders", neuron resampling; "reinitialize" is the simple variant
of Neel Nanda's open-source replication (2023).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sae.distributed.parts import ALONE, Parts
from lightning_sae.functional.geometry import unit_rows


def resampling_weights(
    inputs: Float[Tensor, "n d_in"], losses: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Relative probability with which each input becomes a latent's direction: its loss squared.

    Where all losses are zero, every input counts the same. An input of zero has no direction and
    is never chosen.

    Returns:
        Weights in float64, the largest 1: a loss may be so large that its square overflows.

    Raises:
        ValueError: If all inputs are zero.

    Example:
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> resampling_weights(inputs, torch.tensor([2.0, 4.0, 9.0]))
        tensor([0.2500, 1.0000, 0.0000], dtype=torch.float64)
    """
    usable = (inputs != 0).any(dim=-1)
    if not usable.any():
        raise ValueError(
            "Expected inputs to resample dead latents from, but all of them are zero as the "
            "encoder sees them: the data is constant; look at the hook and its activations."
        )
    weights = losses.double() * usable
    weights = torch.where(weights.max() > 0, weights / weights.max(), usable.double())
    return weights.square()


def sample_directions(
    inputs: Float[Tensor, "n d_in"],
    losses: Float[Tensor, " n"],
    count: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count d_in"]:
    """Draw inputs with probability proportional to their loss squared, scaled to unit norm.

    Args:
        inputs: Candidates, as the encoder sees them.
        losses: Squared error of each candidate, at least 0.
        count: How many to draw: without replacement, unless fewer candidates have weight.
        generator: A CPU generator; the draw is made on the CPU for any device of `inputs`.

    Raises:
        ValueError: If all inputs are zero.
    """
    weights = resampling_weights(inputs, losses).cpu()
    enough = int((weights > 0).sum()) >= count
    drawn = torch.multinomial(weights, count, replacement=not enough, generator=generator)
    return unit_rows(inputs[drawn.to(inputs.device)].float())


def mean_norm(rows: Float[Tensor, "rows d"], parts: Parts = ALONE) -> Float[Tensor, ""]:
    """Mean Euclidean norm of the rows, on all devices; 1, that of new latents, if there are none.

    Example:
        >>> mean_norm(torch.tensor([[3.0, 4.0], [1.0, 0.0]])), mean_norm(torch.zeros(0, 2))
        (tensor(3.), tensor(1.))
    """
    norms = torch.linalg.vector_norm(rows, dim=-1)
    if parts.n > 1:
        total, count = parts.sum(torch.stack([norms.sum(), norms.new_tensor(len(rows))])).unbind()
        return torch.where(count > 0, total / count, 1.0)
    return norms.mean() if len(rows) else rows.new_ones(())


def dead_latents(
    fired: Int[Tensor, " d_sae"], n_inputs: int, min_frequency: float
) -> Bool[Tensor, " d_sae"]:
    """Which latents fired on a smaller share of the inputs than `min_frequency`.

    With `min_frequency` 0, those that never fired.

    Example:
        >>> fired = torch.tensor([0, 1, 50])
        >>> dead_latents(fired, 100, 0.0), dead_latents(fired, 100, 0.02)
        (tensor([ True, False, False]), tensor([ True,  True, False]))
    """
    return (fired == 0) | (fired < min_frequency * n_inputs)
