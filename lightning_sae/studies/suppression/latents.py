"""What fine-tuning does to each latent, against how often and how strongly it fires."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_sae.architectures import RescaledSAE, SparseAutoencoder
from lightning_sae.functional.correlation import correlation, partial_correlation

Row = dict[str, Any]

RARE = 1e-2
"""Frequency below which the gap in the frequency curve is looked for."""
LEAST_GAP = 0.5
"""Decades that make a gap; counts of one and two firings lie .3 apart."""


def living(
    frequency: Float[Tensor, " d_sae"],
    n_tokens: int,
    rare: float = RARE,
    least_gap: float = LEAST_GAP,
) -> Bool[Tensor, " d_sae"]:
    """Which latents lie above the gap in the curve of sorted frequencies.

    The gap is the widest step between neighbours of sorted log10 frequencies that begins below
    `rare`, if it has `least_gap` decades. Latents that never fired count as half a firing, so that
    they have a place. Where there is no gap, dead latents are those that never fired.

    Args:
        frequency: Share of tokens on which each latent fires.
        n_tokens: Number of tokens.
        rare: Frequency below which a gap may begin.
        least_gap: Least width of a gap, in decades.

    Example:
        >>> living(torch.tensor([0.1, 1e-5, 0.05, 2e-5, 0.0]), 100_000)
        tensor([ True, False,  True, False, False])
    """
    logs = frequency.double().clamp_min(0.5 / n_tokens).log10()
    in_order = logs.sort().values
    steps = in_order.diff() * (in_order[:-1] < torch.tensor(rare, dtype=torch.float64).log10())
    if len(steps) == 0 or steps.max() < least_gap:
        return frequency > 0
    at = int(steps.argmax())
    return (logs > in_order[at : at + 2].mean()) & (frequency > 0)


@torch.no_grad()
def learned_scaling(original: SparseAutoencoder, sae: RescaledSAE) -> Float[Tensor, " d_sae"]:
    """What each latent's contribution is multiplied by: its scale times the growth of its row."""
    return sae.scale * sae.W_dec.norm(dim=-1) / original.W_dec.norm(dim=-1)


@torch.no_grad()
def latent_rows(saes: Mapping[str, SparseAutoencoder], fires: Mapping[str, Any]) -> list[Row]:
    """A row for each latent of the original: how it fires, and what `decoder` and `scale` made."""
    original, decoder, scale = saes["original"], saes["decoder"], saes["scale"]
    assert isinstance(decoder, RescaledSAE)
    assert isinstance(scale, RescaledSAE)
    frequency = torch.tensor(fires["frequency"], dtype=torch.float64)
    strength = torch.tensor(fires["strength"], dtype=torch.float64)
    scaling = learned_scaling(original, decoder).cpu()
    columns = {
        "frequency": frequency,
        "strength": strength,
        "alive": living(frequency, fires["n_tokens"]),
        "scaling": scaling,
        "added": (scaling - 1) * strength,
        "scaling_by_scale": learned_scaling(original, scale).cpu(),
        "cosine": cosine_similarity(original.W_dec, decoder.W_dec, dim=-1).cpu(),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"latent": latent, **dict(zip(columns, row, strict=True))}
        for latent, row in enumerate(values)
    ]


def associations(rows: Sequence[Row]) -> dict[str, float | None]:
    """Correlations over the living latents of one SAE; None where there are none.

    Returns:
        For `scaling` and `added`, each against `log_strength` and `log_frequency`, the correlation
        as `scaling,log_strength` and, with the other one given, as `scaling,log_strength,partial`;
        also `cosine`, the mean, and `living`, the number of latents.
    """
    own = [row for row in rows if row["alive"]]
    names = ("frequency", "strength", "scaling", "added", "cosine")
    of = {name: torch.tensor([row[name] for row in own]).double() for name in names}
    causes = {"log_strength": of["strength"].log10(), "log_frequency": of["frequency"].log10()}
    found = {"living": float(len(own)), "cosine": float(of["cosine"].mean())}
    for effect in ("scaling", "added"):
        for name, other in (
            ("log_strength", "log_frequency"),
            ("log_frequency", "log_strength"),
        ):
            x, y, given = of[effect], causes[name], causes[other]
            found[f"{effect},{name}"] = float(correlation(x, y))
            found[f"{effect},{name},partial"] = float(partial_correlation(x, y, given))
    return {name: None if math.isnan(value) else value for name, value in found.items()}
