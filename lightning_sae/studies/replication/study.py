"""The study of replication: SAEs on MLP activations, dead latents, and the ultra-rare ones."""

import copy
import json
import math
import sys
import time
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
from lightning_sae.callbacks import OrthogonalTo
from lightning_sae.checks import require_positive
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.studies.replication.plots import (
    CONSTRAINED,
    FINAL_WINDOWS,
    LABELS,
    LOSS_SQUARED,
    OUT,
    PLAIN,
    PRUNED,
    RARE,
    RAREST,
    REINITIALIZE,
)
from lightning_sae.studies.replication.report import report
from lightning_sae.studies.replication.snapshots import (
    FrequencySnapshots,
    Snapshots,
    read_snapshots,
)
from lightning_sae.studies.shared.evaluation import evaluate
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.folder import write_json
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together

WINDOW = 0.05  # share of a run in a snapshot of the frequencies
RESAMPLE_EVERY, RESAMPLE_UNTIL = 0.15, 0.75  # shares of a run
CALLBACKS = "lightning_sae.callbacks"


def replication(
    l1_coefficient: float = 5.0,
    out_l1_coefficient: float = 4.0,
    out_hook_name: str | None = None,
    output: str = "runs/replication",
    hook_name: str = "blocks.1.mlp.hook_post",
    d_sae: int = 2048,
    **common: Any,
) -> None:
    """Train SAEs on MLP activations, with dead latents resampled or not, and look at the rare ones.

    On one pass of the language model SAEs are trained on the MLP's activations: without resampling,
    and with each of the two schemes of `DeadFeatureResampling`; and one on the MLP's output. How
    often latents fire is followed through training. Then another is trained whose latents are kept
    orthogonal to the direction that the first one's rare latents share. Written are `results.json`,
    `members.csv`, `rare.csv`, `frequencies.csv`, pictures and `report.html`.

    Args:
        l1_coefficient: L1 coefficient of the SAEs on the MLP's activations.
        out_l1_coefficient: That of the SAE on the MLP's output.
        out_hook_name: The hook of the MLP's output; by default `hook_mlp_out` of the same block.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook of the MLP's activations.
        d_sae: Latents of each SAE.
        common: What the studies of language models have in common; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, or `output` has something else in it.
    """
    require_positive(l1_coefficient=l1_coefficient, out_l1_coefficient=out_l1_coefficient)
    out = out_hook_name or _output_of(hook_name)
    setting = Setting(output, [hook_name, out], d_sae=d_sae, **common)
    if setting.share(RESAMPLE_EVERY) < 1:
        raise ValueError(
            f"Expected argument `steps` to be at least {math.ceil(1 / RESAMPLE_EVERY)}, for "
            f"latents are resampled within a run, but got {setting.steps}."
        )
    own = {"l1_coefficient": l1_coefficient, "out_l1_coefficient": out_l1_coefficient}
    folder = setting.open(**own)
    began = time.perf_counter()
    results = [_one_seed(setting, folder / f"seed-{s}", s, own) for s in range(setting.seeds)]
    page, made = report(folder, results)
    seconds = time.perf_counter() - began
    last = f"Made: {', '.join(map(str, made))}, in {seconds:.0f} s."
    sys.stdout.write("\n".join([*page.lines(), "", last]) + "\n")


def _output_of(hook_name: str) -> str:
    if not hook_name.endswith(".mlp.hook_post"):
        raise ValueError(
            "Expected argument `hook_name` to end in `.mlp.hook_post`, the MLP's activations, but "
            f"got {hook_name}: give `out_hook_name` beside it."
        )
    return hook_name.removesuffix("mlp.hook_post") + "hook_mlp_out"


# Training.


def _one_seed(
    setting: Setting, folder: Path, seed: int, coefficients: Mapping[str, float]
) -> dict[str, Any]:
    """Train and measure all SAEs of a seed, or read what was done before."""
    saes = train_together(setting, folder, _members(setting, folder, coefficients), seed=seed)
    for name in (PLAIN, OUT):
        if name not in saes:
            raise FloatingPointError(
                f"The SAE `{name}`, with which the others are compared, did not stay finite with "
                f"seed {seed}: lower `lr`={setting.lr}, and name another `output`."
            )
    rare = _rare(_final(folder, PLAIN))
    if rare.any():
        saes |= _constrained(setting, folder, seed, coefficients, saes[PLAIN], rare)
    kept = folder / "figures.json"
    if not kept.is_file():
        write_json(kept, _known(_figures(setting, folder, saes)))
    figures = json.loads(kept.read_text())
    return {**figures, "snapshots": {name: _snapshots(folder, name) for name in saes}}


def _members(
    setting: Setting, folder: Path, coefficients: Mapping[str, float]
) -> list[dict[str, Any]]:
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
    member["callbacks"].append(FrequencySnapshots(_frequencies(folder, name), window))
    return {**member, "hook_name": hook_name}


def _constrained(
    setting: Setting,
    folder: Path,
    seed: int,
    coefficients: Mapping[str, float],
    plain: SparseAutoencoder,
    rare: Bool[Tensor, " d_sae"],
) -> dict[str, SparseAutoencoder]:
    """An SAE like the plain one, its latents orthogonal to what the rare ones of that one share."""
    activations = setting.hook_names[0]
    direction = mean_direction(plain.W_enc.detach().T[rare])
    member = _member(setting, folder, CONSTRAINED, coefficients["l1_coefficient"], activations)
    member["callbacks"].insert(0, OrthogonalTo(direction))
    data = setting.data(seed, [activations])
    return train_together(setting, folder / CONSTRAINED, [member], seed=seed, data=data)


# Frequencies.


def _frequencies(folder: Path, name: str) -> Path:
    return folder / "frequencies" / f"{name}.safetensors"


def _snapshots(folder: Path, name: str) -> Snapshots:
    return read_snapshots(_frequencies(folder, name))


def _final(folder: Path, name: str) -> Tensor:
    return _snapshots(folder, name).frequency(-1, FINAL_WINDOWS)


def _rare(frequency: Tensor) -> Bool[Tensor, " d_sae"]:
    return frequency < RARE


# Measuring.


def _figures(
    setting: Setting, folder: Path, saes: Mapping[str, SparseAutoencoder]
) -> dict[str, Any]:
    """Held-out figures of all SAEs, and of the plain one without its rare latents; directions."""
    activations, output = setting.hook_names
    data, n = setting.held_out([activations]), setting.held_out_tokens
    on_activations = {name: sae for name, sae in saes.items() if name != OUT}
    rare = {name: _rare(_final(folder, name)) for name in saes}
    without = {PRUNED: without_latents(saes[PLAIN], rare[PLAIN])}
    figures = evaluate(on_activations | without, data, n, folder / "evaluation.json")
    out_data = setting.held_out([output])
    figures |= evaluate({OUT: saes[OUT]}, out_data, n, folder / "out_evaluation.json")
    return {
        "figures": {
            name: {key: value for key, value in each.items() if key != "frequency"}
            for name, each in figures.items()
        },
        "latents": {name: _latents(sae, _snapshots(folder, name)) for name, sae in saes.items()},
        "rare": {
            name: rare_directions(sae, rare[name]) | _together(sae, rare[name], data, n)
            for name, sae in on_activations.items()
        },
        "per_latent": {name: _per_latent(sae, rare[name]) for name, sae in saes.items()},
    }


def _known(figures: Any) -> Any:
    """Figures with a null for what there is none of, which JSON has no other word for."""
    if isinstance(figures, dict):
        return {name: _known(value) for name, value in figures.items()}
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def _together(
    sae: SparseAutoencoder, rare: Tensor, data: ActivationDataModule, n: int
) -> dict[str, float]:
    return firing_together(sae.to(data.language_model.device), rare, HeldOutBatches(data, n))


def without_latents(sae: SparseAutoencoder, latents: Bool[Tensor, " d_sae"]) -> SparseAutoencoder:
    """A copy of an SAE in whose reconstruction some latents have no part."""
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_dec[latents] = 0
    return other


@torch.no_grad()
def _latents(sae: SparseAutoencoder, snapshots: Snapshots) -> dict[str, float]:
    """How often latents fire at the end of training, and what became of the rare ones."""
    frequency = snapshots.frequency(-1, FINAL_WINDOWS)
    middle = snapshots.frequency(len(snapshots.steps) // 2, FINAL_WINDOWS)
    rose = frequency[_rare(middle)] >= RARE
    cosines = encoder_decoder_cosines(sae).cpu()
    share = {
        "never": frequency == 0,
        "below_1e-5": frequency < RAREST,
        "below_1e-4": _rare(frequency),
    }
    return {
        **{name: float(which.double().mean()) for name, which in share.items()},
        "rare_at_half_that_rose": float(rose.double().mean()),
        "encoder_decoder_cosine": median(cosines[~_rare(frequency)]),
        "encoder_decoder_cosine_rare": median(cosines[_rare(frequency)]),
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
