"""The study of replication: SAEs on MLP activations, dead latents, and the ultra-rare ones."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sae.checks import require_positive
from lightning_sae.studies.replication.measure import measure, rare_of, snapshots_of
from lightning_sae.studies.replication.report import report
from lightning_sae.studies.replication.settings import OUT, PLAIN, RESAMPLE_EVERY
from lightning_sae.studies.replication.train import constrained, members_of
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.rows import without_nan
from lightning_sae.studies.shared.seeds import run_seeds
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together


def replication(
    l1_coefficient: float = 5.0,
    out_l1_coefficient: float = 4.0,
    out_hook_name: str | None = None,
    output: str = "runs/replication",
    hook_name: str = "blocks.1.mlp.hook_post",
    d_sae: int = 2048,
    **common: Any,
) -> None:
    """Train SAEs on MLP activations with and without resampling, and compare their rare latents.

    On one pass of the language model SAEs are trained on the MLP's activations: without resampling,
    and with each of the two schemes of `DeadFeatureResampling`; and one on the MLP's output. How
    often latents fire is recorded during training. Then another SAE is trained whose latents are
    kept orthogonal to the direction that the first one's rare latents share. The study writes
    `results.json`, `members.csv`, `frequencies.csv`, pictures and `report.html`.

    Args:
        l1_coefficient: L1 coefficient of the SAEs on the MLP's activations.
        out_l1_coefficient: That of the SAE on the MLP's output.
        out_hook_name: The hook of the MLP's output; by default `hook_mlp_out` of the same block.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook of the MLP's activations.
        d_sae: Latents of each SAE.
        common: As for every study of a language model; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, or `output` has something else in it.
    """
    require_positive(l1_coefficient=l1_coefficient, out_l1_coefficient=out_l1_coefficient)
    out = out_hook_name or _output_of(hook_name)
    setting = Setting(output, [hook_name, out], d_sae=d_sae, **common)
    if setting.share(RESAMPLE_EVERY) < 1:
        raise ValueError(
            f"Expected argument `steps` to be at least {math.ceil(1 / RESAMPLE_EVERY)}, since "
            f"latents are resampled within a run, but got {setting.steps}."
        )
    own = {"l1_coefficient": l1_coefficient, "out_l1_coefficient": out_l1_coefficient}
    run_seeds(setting, own, lambda part, seed: _one_seed(setting, part, seed, own), report)


def _output_of(hook_name: str) -> str:
    if not hook_name.endswith(".mlp.hook_post"):
        raise ValueError(
            "Expected argument `hook_name` to end in `.mlp.hook_post`, the MLP's activations, but "
            f"got {hook_name}: give `out_hook_name` beside it."
        )
    return hook_name.removesuffix("mlp.hook_post") + "hook_mlp_out"


def _one_seed(
    setting: Setting, folder: Path, seed: int, coefficients: Mapping[str, float]
) -> dict[str, Any]:
    """Train and measure all SAEs of a seed, or read what was done before."""
    saes = train_together(setting, folder, members_of(setting, folder, coefficients), seed=seed)
    for name in (PLAIN, OUT):
        if name not in saes:
            raise FloatingPointError(
                f"The SAE `{name}`, with which the others are compared, did not stay finite with "
                f"seed {seed}: lower `lr`={setting.lr}, and name another `output`."
            )
    rare = rare_of(folder, PLAIN)
    if rare.any():
        saes |= constrained(setting, folder, seed, coefficients, saes[PLAIN], rare)
    figures = computed_once(
        folder / "figures.json", lambda: without_nan(measure(setting, folder, saes))
    )
    return {**figures, "snapshots": {name: snapshots_of(folder, name) for name in saes}}
