"""Hyperplanes with the data on one side, which the rows of dying latents are said to approach.

Source: a comment on Neel Nanda, Open source replication (2023): a latent that helps nothing
is pushed to fire as rarely as possible, so that its encoder row approaches the normal of a
hyperplane with all activations on one side.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.studies.shared.rows import Row

RIDGE = 1e-3  # added to the covariance, in mean variances, for directions with hardly any
STARTS = 16
STEPS, BATCH, RATE = 200, 4096, 0.1


def normal_of(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    r"""The direction on whose negative side as much of the data is as possible, if it is normal.

    :math:`w = -(C + \epsilon I)^{-1} \mu`, with mean and covariance of the data, minimises the mean
    of :math:`w \cdot x` over its standard deviation. Its scale is that of no unit.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
        >>> normal_of(x) / normal_of(x).norm()
        tensor([-1., -0.])
    """
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(x.shape[1])
    return -torch.linalg.solve(covariance + ridge, x.mean(0))


@torch.no_grad()
def descend(
    x: Float[Tensor, "n d"],
    rows: Float[Tensor, "rows d"],
    offset: float,
    generator: torch.Generator,
) -> Float[Tensor, "rows d"]:
    r"""Turn directions downhill on the mean of :math:`\mathrm{ReLU}(w \cdot x + b)`, with |w| = 1.

    That is the penalty that a latent pays which nothing else acts on. Steps have the same length
    for all rows and fall to 0, so that a row moves unless it never fires.

    Args:
        x: Activations, scaled to a mean square of 1 per coordinate.
        rows: Where to start.
        offset: The bias b.
        generator: Of the batches.
    """
    w = unit_rows(rows)
    for step in range(STEPS):
        batch = x[torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)]
        fires = (batch @ w.T + offset > 0).to(x.dtype)
        slope = fires.T @ batch / len(batch)
        slope -= (slope * w).sum(-1, keepdim=True) * w
        w = unit_rows(w - RATE * (1 - step / STEPS) * unit_rows(slope))
    return w


def hyperplanes(
    sae: SparseAutoencoder, rare: Bool[Tensor, " d_sae"], x: Float[Tensor, "n d_in"]
) -> Row:
    """Whether there is one direction that rows of dying latents approach.

    Random directions are given the offset of the rare latents, and turned downhill on the penalty.

    Args:
        sae: The SAE.
        rare: Its rare latents.
        x: Raw activations.

    Returns:
        `random_fires` and `ends_fire`, the share of activations on which a latent of such a
        direction fires, at the start and at the end; `ends_alike`, the mean cosine of the ends
        with each other; `ends_with_rare`, the largest cosine of an end with the rare latents'
        common direction; and `rare_moved`, the median cosine of rare rows with where they end.
    """
    generator = torch.Generator().manual_seed(0)
    seen = sae.encoder_input(x)
    scale = seen.square().mean().sqrt()
    rows = unit_rows(sae.W_enc.T)
    norms = torch.linalg.vector_norm(sae.W_enc, dim=0)
    offset = float((sae.b_enc / norms / scale)[rare].median())
    seen = seen / scale
    random = unit_rows(torch.randn(STARTS, x.shape[1], generator=generator))
    ends = descend(seen, random, offset, generator)
    own = rows[rare][:STARTS]
    common = unit_rows(sae.W_enc.T[rare].mean(0)[None]).squeeze(0)
    alike = ends @ ends.T
    return {
        "random_fires": float((seen @ random.T + offset > 0).double().mean()),
        "ends_fire": float((seen @ ends.T + offset > 0).double().mean()),
        "ends_alike": float((alike.sum() - STARTS) / (STARTS * (STARTS - 1))),
        "ends_with_rare": float((ends @ common).max()),
        "rare_moved": float((descend(seen, own, offset, generator) * own).sum(-1).median()),
    }
