"""Figures of the SAEs of the study of replication."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lightning_sae.analysis.rare_latents import (
    encoder_decoder_cosines,
    firing_together,
    mean_direction,
    median,
    rare_directions,
)
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.studies.replication.settings import (
    FINAL_WINDOWS,
    OUT,
    PLAIN,
    PRUNED,
    RARE,
    RAREST,
)
from lightning_sae.studies.shared.evaluation import evaluate, scalars
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.snapshots import Snapshots, frequencies_path, read_snapshots


def snapshots_of(folder: Path, name: str) -> Snapshots:
    """How often the latents of an SAE fired during training."""
    return read_snapshots(frequencies_path(folder, name))


def rare_of(folder: Path, name: str) -> Bool[Tensor, " d_sae"]:
    """Which latents of an SAE are rare at the end of training."""
    return snapshots_of(folder, name).frequency(-1, FINAL_WINDOWS) < RARE


def measure(
    setting: Setting, folder: Path, saes: Mapping[str, SparseAutoencoder]
) -> dict[str, Any]:
    """Figures of all SAEs of a seed, and of the plain one without its rare latents.

    Returns:
        By SAE: `figures` on held-out text, `latents` on frequencies, `rare` on the rare latents,
        and `per_latent` lists.
    """
    activations, output = setting.hook_names
    data, n = setting.held_out([activations]), setting.held_out_tokens
    on_activations = {name: sae for name, sae in saes.items() if name != OUT}
    rare = {name: rare_of(folder, name) for name in saes}
    without = {PRUNED: without_latents(saes[PLAIN], rare[PLAIN])}
    figures = evaluate(on_activations | without, data, n, folder / "evaluation.json")
    out_data = setting.held_out([output])
    figures |= evaluate({OUT: saes[OUT]}, out_data, n, folder / "out_evaluation.json")
    return {
        "figures": {name: scalars(each) for name, each in figures.items()},
        "latents": {name: _latents(sae, snapshots_of(folder, name)) for name, sae in saes.items()},
        "rare": {
            name: rare_directions(sae, rare[name]) | _together(sae, rare[name], data, n)
            for name, sae in on_activations.items()
        },
        "per_latent": {name: _per_latent(sae, rare[name]) for name, sae in saes.items()},
    }


def _together(
    sae: SparseAutoencoder, rare: Tensor, data: ActivationDataModule, n: int
) -> dict[str, float]:
    return firing_together(sae.to(data.language_model.device), rare, HeldOutBatches(data, n))


def without_latents(sae: SparseAutoencoder, latents: Bool[Tensor, " d_sae"]) -> SparseAutoencoder:
    """A copy of an SAE whose reconstruction leaves out some latents."""
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_dec[latents] = 0
    return other


@torch.no_grad()
def _latents(sae: SparseAutoencoder, snapshots: Snapshots) -> dict[str, float]:
    """Shares of latents by frequency at the end of training, and cosines of encoder and decoder."""
    frequency = snapshots.frequency(-1, FINAL_WINDOWS)
    middle = snapshots.frequency(len(snapshots.steps) // 2, FINAL_WINDOWS)
    rose = frequency[middle < RARE] >= RARE
    cosines = encoder_decoder_cosines(sae).cpu()
    share = {
        "never": frequency == 0,
        "below_1e-5": frequency < RAREST,
        "below_1e-4": frequency < RARE,
    }
    return {
        **{name: float(which.double().mean()) for name, which in share.items()},
        "rare_at_half_that_rose": float(rose.double().mean()),
        "encoder_decoder_cosine": median(cosines[frequency >= RARE]),
        "encoder_decoder_cosine_rare": median(cosines[frequency < RARE]),
        "activations_counted": float(snapshots.n[-FINAL_WINDOWS:].sum()),
    }


@torch.no_grad()
def _per_latent(sae: SparseAutoencoder, rare: Tensor) -> dict[str, list[Any]]:
    direction = mean_direction(sae.W_enc.T[rare])
    return {
        "rare": rare.tolist(),
        "rare_direction": direction.tolist(),
        "with_rare_direction": (unit_rows(sae.W_enc.T) @ direction).tolist(),
        "encoder_decoder_cosine": encoder_decoder_cosines(sae).tolist(),
    }
