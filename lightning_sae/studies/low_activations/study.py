"""The study of low activations: what does it cost to remove them, and which way costs least?"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import require_positive
from lightning_sae.data import ActivationDataModule
from lightning_sae.loading import load
from lightning_sae.studies.low_activations.removing import firings_of, measure, variants
from lightning_sae.studies.low_activations.report import report
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.folder import write_json
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together

RELU = "lightning_sae.ReLUSAE"
SQRT = {"penalty": {"class_path": "lightning_sae.functional.penalties.Sqrt"}}


def low_activations(
    coefficients: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    sqrt_coefficients: Sequence[float] = (),
    sae: str | Sequence[str] | None = None,
    shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
    calibration_tokens: int = 65536,
    output: str = "runs/low-activations",
    hook_name: str = "blocks.1.hook_resid_post",
    **common: Any,
) -> None:
    """Remove the lowest activations of trained SAEs in four ways, and see what that costs.

    SAEs of several L0 are trained on one pass of the language model, or given by `sae`. Their
    lowest activations are removed: the lowest k of each token, those below a share of each latent's
    maximum, below a quantile of each latent, below one threshold for all. Levels follow from the
    share of all firings to be removed, on training text; what is left is measured on held-out text,
    all SAEs, ways and levels on one pass over the activations. Written are `results.json`,
    `points.csv`, `halving.csv`, `frontier.csv`, pictures and `report.html`.

    Args:
        coefficients: L1 coefficients, one for each SAE to train.
        sqrt_coefficients: The same for SAEs with a square-root penalty.
        sae: Folder of an SAE at this hook, or several; they are then taken in place of training.
        shares: Shares of all firings to be removed, each above 0 and below 1.
        calibration_tokens: Tokens of training text on which maxima and quantiles are measured.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook.
        common: What the studies of language models have in common; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, an SAE is not of this hook, or `output` has
            something else in it.
    """
    setting = Setting(output, hook_name, **common)
    _check(coefficients, sqrt_coefficients, shares, calibration_tokens)
    families = _families(coefficients, sqrt_coefficients)
    folders = [sae] if isinstance(sae, str) else list(sae or [])
    given = _given(folders, hook_name, setting)
    folder = setting.open(
        coefficients=list(coefficients),
        sqrt_coefficients=list(sqrt_coefficients),
        sae=[str(Path(each).resolve()) for each in folders],
        shares=list(shares),
        calibration_tokens=calibration_tokens,
    )
    began = time.perf_counter()
    results = []
    for seed in range(1 if given else setting.seeds):
        part = folder / f"seed-{seed}"
        saes = given or train_together(setting, part, _members(setting, families), seed=seed)
        data = setting.held_out()
        results.append(
            _measured(saes, data, setting.held_out_tokens, shares, calibration_tokens, part)
        )
    of = {f"{f.name}-{value:g}": f.label for f in families for value in f.coefficients}
    page, made = report(folder, dict.fromkeys(given, "") or of, results)
    seconds = time.perf_counter() - began
    last = f"Made: {', '.join(map(str, made))}, in {seconds:.0f} s."
    sys.stdout.write("\n".join([*page.lines(), "", last]) + "\n")


def _check(
    coefficients: Sequence[float],
    sqrt_coefficients: Sequence[float],
    shares: Sequence[float],
    calibration_tokens: int,
) -> None:
    require_positive(calibration_tokens=calibration_tokens)
    every = [*coefficients, *sqrt_coefficients]
    if not every or min(every) <= 0 or len({*coefficients}) < len(coefficients):
        raise ValueError(
            "Expected argument `coefficients` to be different numbers above 0 but got "
            f"{list(coefficients)}, and `sqrt_coefficients`={list(sqrt_coefficients)}."
        )
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(
            "Expected argument `shares` to be numbers above 0 and below 1, the shares of all "
            f"firings to remove, but got {list(shares)}."
        )


def _given(
    folders: Sequence[str], hook_name: str, setting: Setting
) -> dict[str, SparseAutoencoder]:
    """The SAEs in folders, by the folders' names; none if there are no folders."""
    if not folders:
        return {}
    found = {Path(folder).resolve().name: load(folder) for folder in folders}
    if len(found) < len(folders):
        raise ValueError(
            f"Expected argument `sae` to be folders with different names but got {list(folders)}: "
            "copy one to a folder with another name."
        )
    width = setting.data().d_in
    for name, sae in found.items():
        trained_at = sae.source.get("hook_name", hook_name)
        if trained_at != hook_name or sae.d_in != width:
            raise ValueError(
                f"Expected argument `sae` to be SAEs at `hook_name`={hook_name}, {width} wide, but "
                f"{name} is one at {trained_at}, {sae.d_in} wide: give its hook and model."
            )
    return found


def _families(coefficients: Sequence[float], sqrt_coefficients: Sequence[float]) -> list[Family]:
    return [
        Family("l1", "L1", RELU, tuple(coefficients)),
        Family("sqrt", "square root", RELU, tuple(sqrt_coefficients), SQRT),
    ]


def _members(setting: Setting, families: Sequence[Family]) -> list[dict[str, Any]]:
    return [
        family.member(setting, f"{family.name}-{value:g}", value, setting.lr)
        for family in families
        for value in family.coefficients
    ]


def _measured(
    saes: Mapping[str, SparseAutoencoder],
    data: ActivationDataModule,
    n_tokens: int,
    shares: Sequence[float],
    calibration_tokens: int,
    folder: Path,
) -> dict[str, Any]:
    """Figures of all SAEs, ways and levels; from the folder, if they were measured before."""
    kept = folder / "points.json"
    if not kept.is_file():
        began = time.perf_counter()
        for sae in saes.values():
            sae.to(data.language_model.device)
        found = firings_of(saes, data, calibration_tokens)
        ways = {name: variants(each, shares) for name, each in found.items()}
        points, clean = measure(saes, ways, data, n_tokens)
        write_json(kept, {"ce_clean": clean, "points": points})
        seconds = time.perf_counter() - began
        sys.stderr.write(f"measured {len(points)} variants of {len(saes)} SAEs, {seconds:.0f} s\n")
    return dict(json.loads(kept.read_text()))
