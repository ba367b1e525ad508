"""Training of the SAEs of the study of broken latents on a language model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.callbacks import AuxThresholdWarmup, DecoderNormProjection
from lightning_sae.studies.broken_latents_lm.settings import NONE, Variant
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together


def train(
    setting: Setting, folder: Path, found: Sequence[Variant], seed: int, l0: float
) -> dict[str, SparseAutoencoder]:
    """Train all SAEs of a seed on one pass of the language model.

    SAEs of one width begin with the same decoder rows, and those of all kinds have the same
    batches.
    """
    data = setting.data(seed)
    members = [_member(setting, variant, data.d_in, seed, l0) for variant in found]
    return train_together(setting, folder, members, seed=seed, data=data)


def _member(setting: Setting, variant: Variant, d_in: int, seed: int, l0: float) -> dict[str, Any]:
    common = setting.arguments()
    del common["d_sae"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = variant.sae(d_in, l0, **common)
    callbacks: list[Any] = [DecoderNormProjection()]
    if variant.rule != NONE:  # off for a third of the run, then rising for one, as in the source
        callbacks.append(AuxThresholdWarmup(1 / 3, 1 / 3))
    return {"name": variant.name, "sae": sae, "callbacks": callbacks}
