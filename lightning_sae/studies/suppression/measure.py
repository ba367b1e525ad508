"""Figures of SAEs before and after fine-tuning, and of each latent."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_sae.architectures import RescaledSAE, SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.functional.correlation import correlation, partial_correlation
from lightning_sae.studies.shared.evaluation import evaluate, scalars
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.rows import Row, select
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.suppression.train import ENCODER_IS_FROZEN, METHODS, ORIGINAL, SAEs

RARE = 1e-2
"""Frequency below which a gap in the frequency curve may begin."""
LEAST_GAP = 0.5
"""Least width of a gap in decades; counts of one and two firings are 0.3 apart."""


def measure(
    setting: Setting, folder: Path, starts: SAEs, copies: SAEs, seed: int
) -> dict[str, list[Row]]:
    """Figures of the SAEs before fine-tuning and of their copies.

    Args:
        setting: The study's.
        folder: Of the seed.
        starts: The SAEs before fine-tuning, by hook.
        copies: By hook and method.
        seed: For the rows.

    Returns:
        `methods`, a row for each hook and method; `latents`, a row for each hook and latent.
    """
    data, n = setting.held_out(), setting.held_out_tokens
    rows: dict[str, list[Row]] = {"methods": [], "latents": []}
    for hook in setting.hook_names:
        at_hook = data.at(hook)
        saes = {ORIGINAL: starts[hook], **{name: copies[f"{hook}-{name}"] for name in METHODS}}
        figures = evaluate(saes, at_hook, n, folder / "figures" / f"{hook}.json")
        fires = _firings(saes, at_hook, n, folder / "firings" / f"{hook}.json")
        common = {"seed": seed, "hook": hook}
        rows["methods"] += [
            {
                **common,
                "method": name,
                **scalars(own),
                "dead": round(own["dead_fraction"] * saes[name].d_sae),
                "d_sae": saes[name].d_sae,
                "differing": fires["differing"].get(name),
            }
            for name, own in with_recovered(figures).items()
        ]
        rows["latents"] += [{**common, **row} for row in latent_rows(saes, fires)]
    return rows


def with_recovered(figures: Mapping[str, Row]) -> dict[str, Row]:
    """Figures, and the shares of the original's error and perplexity gap that are recovered."""
    original = figures[ORIGINAL]
    gap = original["perplexity_spliced"] - original["perplexity_clean"]
    return {
        name: {
            **own,
            "mse_removed": 1 - own["mse"] / original["mse"],
            "perplexity_recovered": (original["perplexity_spliced"] - own["perplexity_spliced"])
            / gap,
        }
        for name, own in figures.items()
    }


def _firings(saes: SAEs, data: ActivationDataModule, n_tokens: int, path: Path) -> dict[str, Any]:
    """How often and how strongly each latent of the original fires, and which copies differ.

    Returns:
        `n_tokens`; `frequency` and mean `strength` of firings of each latent; `differing`, the
        number of tokens on which another set of latents fires, by method with a frozen encoder.
    """

    @torch.no_grad()
    def count() -> dict[str, Any]:
        original = saes[ORIGINAL]
        for sae in saes.values():
            sae.to(data.language_model.device)
        counts = torch.zeros(original.d_sae, dtype=torch.float64)
        sums, n = torch.zeros_like(counts), 0
        differing = dict.fromkeys(ENCODER_IS_FROZEN, 0)
        for x in HeldOutBatches(data, n_tokens):
            f = original.encode(x)
            fires = f > 0
            n += len(x)
            counts += fires.sum(0).cpu()
            sums += f.double().sum(0).cpu()
            for name in differing:
                differing[name] += int(((saes[name].encode(x) != 0) != fires).any(-1).sum())
        strength = sums / counts.clamp_min(1)
        frequency = counts / max(1, n)
        found = {"n_tokens": n, "frequency": frequency.tolist(), "strength": strength.tolist()}
        return {**found, "differing": differing}

    return dict(computed_once(path, count))


# Latents.


def living(
    frequency: Float[Tensor, " d_sae"],
    n_tokens: int,
    rare: float = RARE,
    least_gap: float = LEAST_GAP,
) -> Bool[Tensor, " d_sae"]:
    """Which latents lie above the gap in the curve of sorted frequencies.

    The gap is the widest step between neighbours of sorted log10 frequencies that begins below
    `rare`, if it has `least_gap` decades. Latents that never fired count as half a firing. If there
    is no gap, the dead latents are those that never fired.

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
    """The factor on each latent's contribution: its scale times the growth of its decoder row."""
    return sae.scale * sae.W_dec.norm(dim=-1) / original.W_dec.norm(dim=-1)


@torch.no_grad()
def latent_rows(saes: Mapping[str, SparseAutoencoder], fires: Mapping[str, Any]) -> list[Row]:
    """A row for each latent of the original: how it fires, and its scaling by two methods."""
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
    """Correlations over the alive latents of one SAE; None where there are none.

    Returns:
        For `scaling` and `added`, each against `log_strength` and `log_frequency`, the correlation
        as `scaling,log_strength` and, with the other one given, as `scaling,log_strength,partial`;
        also `cosine`, the mean, and `living`, the number of latents.
    """
    own = select(rows, alive=True)
    names = ("frequency", "strength", "scaling", "added", "cosine")
    of = {name: torch.tensor([row[name] for row in own]).double() for name in names}
    causes = {"log_strength": of["strength"].log10(), "log_frequency": of["frequency"].log10()}
    found = {"living": float(len(own)), "cosine": float(of["cosine"].mean())}
    for effect in ("scaling", "added"):
        for name, other in (("log_strength", "log_frequency"), ("log_frequency", "log_strength")):
            x, y, given = of[effect], causes[name], causes[other]
            found[f"{effect},{name}"] = float(correlation(x, y))
            found[f"{effect},{name},partial"] = float(partial_correlation(x, y, given))
    return {name: None if math.isnan(value) else value for name, value in found.items()}
