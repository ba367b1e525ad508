"""The study of low activations: what does it cost to remove them, and which way costs least?"""

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import require_positive
from lightning_sae.studies.low_activations.measure import WAYS, firings_of, measure, removals
from lightning_sae.studies.low_activations.report import report
from lightning_sae.studies.low_activations.train import (
    families_of,
    given_saes,
    labels_of,
    members_of,
    scaled,
)
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.seeds import run_seeds
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together

NAMES = ",".join(WAYS)
SWEPT = ("coefficients", "sqrt_coefficients", "gated_coefficients", "jumprelu_l0")


def low_activations(
    coefficients: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    sqrt_coefficients: Sequence[float] = (),
    gated_coefficients: Sequence[float] = (),
    jumprelu_l0: Sequence[float] = (),
    lengths: Sequence[float] = (1.0,),
    sae: str | Sequence[str] | None = None,
    ways: str = NAMES,
    shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
    calibration_tokens: int = 65536,
    output: str = "runs/low-activations",
    hook_name: str = "blocks.1.hook_resid_post",
    **common: Any,
) -> None:
    """Remove the lowest activations of trained SAEs in four ways and measure what that costs.

    SAEs of several L0 are trained on one pass of the language model, or given by `sae`. Their
    lowest activations are removed: the lowest k of each token, those below a share of each latent's
    maximum, below a quantile of each latent, or below one threshold for all. Levels follow from the
    share of all firings to remove on training text. What is left is measured on held-out text, all
    SAEs, ways and levels on one pass over the activations. The study writes `results.json`,
    `points.csv`, `halving.csv`, `frontier.csv`, pictures and `report.html`.

    Args:
        coefficients: L1 coefficients, one for each SAE to train.
        sqrt_coefficients: The same for SAEs with a square-root penalty.
        gated_coefficients: The same for gated SAEs.
        jumprelu_l0: Target L0 of JumpReLU SAEs, one for each to train.
        lengths: Lengths of training, in multiples of `steps`; all SAEs are trained at each.
        sae: Folder of an SAE at this hook, or several, to use instead of training SAEs.
        ways: Which of lowest_k, share_of_maximum, quantile and global, with commas between them.
        shares: Shares of all firings to be removed, each above 0 and below 1.
        calibration_tokens: Tokens of training text on which maxima and quantiles are measured.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook.
        common: As for every study of a language model; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, an SAE is not of this hook, or `output` has
            something else in it.
    """
    setting = Setting(output, hook_name, **common)
    swept = {
        "l1": [*coefficients],
        "sqrt": [*sqrt_coefficients],
        "gated": [*gated_coefficients],
        "jumprelu": [*jumprelu_l0],
    }
    removing = [way.strip() for way in ways.split(",")]
    _check(swept, lengths, removing, shares, calibration_tokens)
    families = families_of(swept)
    folders = [sae] if isinstance(sae, str) else list(sae or [])
    given = given_saes(folders, hook_name, setting)
    own = {
        "coefficients": swept["l1"],
        "sqrt_coefficients": swept["sqrt"],
        "gated_coefficients": swept["gated"],
        "jumprelu_l0": swept["jumprelu"],
        "lengths": [*lengths],
        "ways": removing,
        "sae": [str(Path(each).resolve()) for each in folders],
        "shares": list(shares),
        "calibration_tokens": calibration_tokens,
    }

    def one_seed(part: Path, seed: int) -> dict[str, Any]:
        saes = given or _trained(setting, part, families, lengths, seed)
        return _measured(saes, setting, removing, shares, calibration_tokens, part)

    labels = labels_of(families, lengths)
    of = dict.fromkeys(given, "") or labels
    run_seeds(setting, own, one_seed, partial(report, families=of), seeds=1 if given else None)


def _trained(
    setting: Setting,
    folder: Path,
    families: Sequence[Family],
    lengths: Sequence[float],
    seed: int,
) -> dict[str, SparseAutoencoder]:
    """The SAEs of all lengths; those of one length are trained side by side."""
    saes: dict[str, SparseAutoencoder] = {}
    for length in lengths:
        longer, members = scaled(setting, length), members_of(setting, families, length)
        part = folder if length == 1 else folder / f"x{length:g}"
        sys.stderr.write(f"seed {seed}: {len(members)} SAEs, {longer.steps:,} steps\n")
        saes |= train_together(longer, part, members, seed=seed)
    return saes


def _check(
    swept: Mapping[str, Sequence[float]],
    lengths: Sequence[float],
    ways: Sequence[str],
    shares: Sequence[float],
    calibration_tokens: int,
) -> None:
    require_positive(calibration_tokens=calibration_tokens)
    for name, values in zip(SWEPT, swept.values(), strict=True):
        if (values and min(values) <= 0) or len({*values}) < len(values):
            raise ValueError(
                f"Expected argument `{name}` to be different numbers above 0 but got {values}."
            )
    if not any(swept.values()):
        raise ValueError(f"Expected one of {', '.join(SWEPT)} to have a number but got none.")
    if not lengths or min(lengths) <= 0 or len({*lengths}) < len(lengths):
        raise ValueError(
            "Expected argument `lengths` to be different numbers above 0, multiples of `steps`, "
            f"but got {list(lengths)}."
        )
    if not {*ways} <= {*WAYS} or len({*ways}) < len(ways):
        raise ValueError(
            f"Expected argument `ways` to be different ones of {NAMES} with commas between them "
            f"but got {','.join(ways)!r}."
        )
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(
            "Expected argument `shares` to be numbers above 0 and below 1, the shares of all "
            f"firings to remove, but got {list(shares)}."
        )


def _measured(
    saes: Mapping[str, SparseAutoencoder],
    setting: Setting,
    removing: Sequence[str],
    shares: Sequence[float],
    calibration_tokens: int,
    folder: Path,
) -> dict[str, Any]:
    """Figures of all SAEs, ways and levels, and of the unchanged model; measured once."""

    def figures() -> dict[str, Any]:
        began = time.perf_counter()
        data = setting.held_out()
        for sae in saes.values():
            sae.to(data.language_model.device)
        found = firings_of(saes, data, calibration_tokens)
        ways = {name: removals(each, shares, removing) for name, each in found.items()}
        points, clean = measure(saes, ways, data, setting.held_out_tokens)
        seconds = time.perf_counter() - began
        sys.stderr.write(f"measured {len(points)} points of {len(saes)} SAEs in {seconds:.0f} s\n")
        return {"ce_clean": clean, "points": points}

    return dict(computed_once(folder / "points.json", figures))
