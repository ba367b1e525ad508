"""Training of the SAEs of the study of replication."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from lightning_sae.analysis.rare_latents import mean_direction
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.callbacks import OrthogonalTo
from lightning_sae.studies.replication.settings import (
    CONSTRAINED,
    LABELS,
    LOSS_SQUARED,
    OUT,
    PLAIN,
    REINITIALIZE,
    RESAMPLE_EVERY,
    RESAMPLE_UNTIL,
    WINDOW,
)
from lightning_sae.studies.shared.families import CALLBACKS, Family
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.snapshots import FrequencySnapshots, frequencies_path
from lightning_sae.studies.shared.training import train_together


def members_of(
    setting: Setting, folder: Path, coefficients: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Descriptions of the SAEs that are trained together, for `SideBySide`."""
    activations, output = setting.hook_names
    every = setting.share(RESAMPLE_EVERY)
    until = max(every, setting.share(RESAMPLE_UNTIL))
    coefficient = coefficients["l1_coefficient"]
    members = [_member(setting, folder, PLAIN, coefficient, activations)]
    for name in (REINITIALIZE, LOSS_SQUARED):
        member = _member(setting, folder, name, coefficient, activations)
        arguments = {"every_n_steps": every, "scheme": name, "stop_after_step": until}
        resampling = {"class_path": f"{CALLBACKS}.DeadFeatureResampling", "init_args": arguments}
        member["callbacks"].append(resampling)
        members.append(member)
    return [*members, _member(setting, folder, OUT, coefficients["out_l1_coefficient"], output)]


def _member(
    setting: Setting, folder: Path, name: str, coefficient: float, hook_name: str
) -> dict[str, Any]:
    family = Family(name, LABELS[name], "lightning_sae.ReLUSAE", (coefficient,))
    member = family.member(setting, name, coefficient, setting.lr)
    window = max(1, setting.share(WINDOW))
    member["callbacks"].append(FrequencySnapshots(frequencies_path(folder, name), window))
    return {**member, "hook_name": hook_name}


def constrained(
    setting: Setting,
    folder: Path,
    seed: int,
    coefficients: Mapping[str, float],
    plain: SparseAutoencoder,
    rare: Bool[Tensor, " d_sae"],
) -> dict[str, SparseAutoencoder]:
    """An SAE like `plain`, its latents kept orthogonal to the mean of the rare ones of `plain`."""
    activations = setting.hook_names[0]
    direction = mean_direction(plain.W_enc.detach().T[rare])
    member = _member(setting, folder, CONSTRAINED, coefficients["l1_coefficient"], activations)
    member["callbacks"].insert(0, OrthogonalTo(direction))
    data = setting.data(seed, [activations])
    return train_together(setting, folder / CONSTRAINED, [member], seed=seed, data=data)
