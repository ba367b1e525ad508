"""Latents that fire very rarely: whether they share a direction and fire together.

Source: Neel Nanda, Open source replication of Towards Monosemanticity (2023). There more than half
of an SAE's latents fire on less than 1e-4 of activations. Nearly all of these have the same encoder
direction, which is also the same for other seeds, but different decoder directions.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.encoding import ids_of
from lightning_sae.functional.geometry import unit_rows

ALIKE = 0.95  # cosine with the mean above which the source counts encoder rows as the same
BEFORE, AFTER = 16, 6  # tokens shown around an input


class Input(NamedTuple):
    """A token whose activation has a large projection on the direction of rare latents.

    Attributes:
        along: The projection of the encoder's input on that direction.
        firing: Share of the rare latents that fire.
        before: Text before the token.
        token: The token's text.
        after: Text after it.
    """

    along: float
    firing: float
    before: str
    token: str
    after: str


def mean_direction(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
    """Mean of rows, scaled to norm 1; zero if there are no rows.

    Example:
        >>> mean_direction(torch.tensor([[2.0, 0.0], [4.0, 0.0]]))
        tensor([1., 0.])
    """
    mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[-1])
    return unit_rows(mean.unsqueeze(0)).squeeze(0)


def share_on_one_direction(rows: Float[Tensor, "rows d_in"]) -> float:
    """Largest share of the rows' squared norm along a single direction.

    1 if all rows are multiples of one vector, about 1 / d_in if there are many random rows, NaN if
    there are none.

    Example:
        >>> share_on_one_direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        0.9
    """
    if not rows.any():
        return float("nan")
    squares = torch.linalg.svdvals(rows.double()).square()
    return round(float(squares[0] / squares.sum()), 12)


@torch.no_grad()
def rare_directions(sae: SparseAutoencoder, rare: Bool[Tensor, " d_sae"]) -> dict[str, float]:
    """How similar the directions of rare latents are, compared with the other latents.

    Args:
        sae: The SAE.
        rare: Which latents are rare.

    Returns:
        `n_rare`, their number; `cosine_with_mean`, the median cosine of their encoder rows with
        the mean of these; `alike`, the share of these cosines above .95; `others_with_mean`, the
        median cosine of the other latents' encoder rows with that mean; and
        `encoder_on_one_direction` and `decoder_on_one_direction` by `share_on_one_direction`. NaN
        where there are no such latents.
    """
    encoder = unit_rows(sae.W_enc.T)
    cosines = encoder @ mean_direction(sae.W_enc.T[rare])
    own, others = cosines[rare], cosines[~rare]
    return {
        "n_rare": float(rare.sum()),
        "cosine_with_mean": median(own),
        "alike": float((own > ALIKE).float().mean()),
        "others_with_mean": median(others) if rare.any() else math.nan,
        "encoder_on_one_direction": share_on_one_direction(sae.W_enc.T[rare]),
        "decoder_on_one_direction": share_on_one_direction(sae.W_dec[rare]),
    }


@torch.no_grad()
def firing_together(
    sae: SparseAutoencoder,
    rare: Bool[Tensor, " d_sae"],
    batches: Iterable[Float[Tensor, "_ d_in"]],
) -> dict[str, float]:
    """Whether rare latents fire on the same activations.

    Args:
        sae: The SAE.
        rare: Which latents are rare.
        batches: Raw activations.

    Returns:
        `on_most_aligned`, the share of rare latents that fire on the activation whose encoder input
        lies furthest along their mean encoder direction; `most_at_once`, the largest share of them
        that fire on one activation; `mean_activation`, the cosine of that direction with the mean
        of the raw activations. NaN without rare latents.
    """
    direction = mean_direction(sae.W_enc.T[rare])
    furthest, on_most_aligned, most = float("-inf"), float("nan"), float("nan")
    total, n = torch.zeros_like(direction, dtype=torch.float64), 0
    for x in batches:
        total, n = total + x.double().sum(0), n + len(x)
        if not rare.any() or not len(x):
            continue
        firing = (sae.encode(x)[:, rare] > 0).float().mean(-1)
        along = sae.encoder_input(sae.scaled(x)) @ direction
        best = int(along.argmax())
        if float(along[best]) > furthest:
            furthest, on_most_aligned = float(along[best]), float(firing[best])
        most = max(float(firing.max()), 0.0 if most != most else most)
    mean = unit_rows((total / max(n, 1)).float().unsqueeze(0)).squeeze(0)
    cosine = float(mean @ direction) if rare.any() else float("nan")
    return {"on_most_aligned": on_most_aligned, "most_at_once": most, "mean_activation": cosine}


@torch.no_grad()
def furthest_inputs(
    sae: SparseAutoencoder,
    rare: Bool[Tensor, " d_sae"],
    data: ActivationDataModule,
    n_tokens: int,
    n: int = 10,
) -> list[Input]:
    """The inputs furthest along the mean encoder direction of rare latents.

    Args:
        sae: The SAE, on the CPU.
        rare: Which latents are rare.
        data: Provides the language model, its text and the filter of training.
        n_tokens: Approximate number of tokens to read.
        n: Maximum number of inputs to return.

    Returns:
        At most `n` inputs, the furthest first; none without rare latents.
    """
    if not rare.any():
        return []
    direction, blocks, read = mean_direction(sae.W_enc.T[rare]), data.training_blocks(), 0
    found: list[Input] = []
    while read < n_tokens and len(tokens := blocks.read_first_epoch(data.blocks_per_pass)):
        read += tokens.numel()
        x = data.language_model.activations(tokens)
        kept = data.filter.kept(tokens, x).cpu()
        x = x.float().cpu()
        along = (sae.encoder_input(sae.scaled(x)) @ direction).masked_fill(~kept, float("-inf"))
        for i in along.flatten().topk(min(n, int(kept.sum()))).indices.tolist():
            row, at = divmod(i, tokens.shape[1])
            firing = float((sae.encode(x[row, at])[rare] > 0).float().mean())
            ids = ids_of(tokens[row])
            parts = ids[max(0, at - BEFORE) : at], ids[at : at + 1], ids[at + 1 : at + 1 + AFTER]
            texts = (data.language_model.tokenizer.decode(part) for part in parts)
            found.append(Input(float(along[row, at]), firing, *texts))
        found = sorted(found, reverse=True)[:n]
    return found


@torch.no_grad()
def encoder_decoder_cosines(sae: SparseAutoencoder) -> Float[Tensor, " d_sae"]:
    """Cosine of each latent's encoder and decoder directions."""
    return (unit_rows(sae.W_enc.T) * unit_rows(sae.W_dec)).sum(-1)


def median(values: Float[Tensor, " n"]) -> float:
    """The median; NaN without values."""
    return float(values.median()) if len(values) else float("nan")
