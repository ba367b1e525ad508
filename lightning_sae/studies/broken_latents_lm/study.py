"""The study of broken latents on a language model."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sae.analysis.evaluation.figures import Questions
from lightning_sae.checks import require_positive
from lightning_sae.studies.broken_latents_lm.measure import asked, measure
from lightning_sae.studies.broken_latents_lm.report import report
from lightning_sae.studies.broken_latents_lm.settings import Variant, variants
from lightning_sae.studies.broken_latents_lm.train import train
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.rows import Row, without_nan
from lightning_sae.studies.shared.seeds import run_seeds
from lightning_sae.studies.shared.setting import Setting


def broken_latents_lm(
    widths: Sequence[int] = (128, 512),
    coefficients: Sequence[float] = (300.0, 3000.0),
    l0: float = 16.0,
    probe_tokens: int = 65536,
    output: str = "runs/broken-latents-lm",
    hook_name: str = "blocks.2.hook_resid_post",
    steps: int = 800,
    batch_size: int = 1024,
    held_out_tokens: int = 16384,
    **common: Any,
) -> None:
    """Train SAEs of a language model with the orthogonality loss, and look for broken latents.

    Untied and tied SAEs, narrow and wide, all steered to the same L0, without the auxiliary loss
    and with it: with the source's threshold, with a mixture's, and over some of the latents'
    firings only; and Matryoshka SAEs with the loss on their inner levels. They are compared by
    absorption, probing, FVU, the peaks of their activations and the overlap of these, and by the
    cross-entropy that splicing adds. The study writes `results.json`, `saes.csv`, `properties.csv`,
    pictures and `report.html`. Source: Chanin et al., Broken latents: studying SAEs and feature
    co-occurrence in toy models (2024), who report that they struggled on language models.

    Args:
        widths: Numbers of latents. All rules for which the loss may act are tried at the first
            width, the main ones with all `coefficients`; and these at the others, with the first.
        coefficients: Weights of the auxiliary loss, of activations scaled to mean norm sqrt(d_in).
        l0: Active latents per activation, of all SAEs.
        probe_tokens: Held-out tokens for absorption, probing and peaks.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook.
        steps: Optimizer steps of each SAE.
        batch_size: Activations in a step.
        held_out_tokens: Held-out tokens for L0, FVU and cross-entropy.
        common: As for every study of a language model but `d_sae`; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, or `output` has something else in it.
    """
    _require_rising("widths", widths)
    _require_rising("coefficients", coefficients)
    require_positive(l0=l0, probe_tokens=probe_tokens)
    setting = Setting(
        output,
        hook_name,
        steps=steps,
        batch_size=batch_size,
        held_out_tokens=held_out_tokens,
        **common,
    )
    found = variants(widths, coefficients)
    questions = asked(setting.held_out(), probe_tokens)
    own = {
        "widths": [*widths],
        "coefficients": [*coefficients],
        "l0": l0,
        "probe_tokens": probe_tokens,
    }

    def one_seed(part: Path, seed: int) -> list[Row]:
        return _one_seed(setting, part, seed, found, l0, questions)

    run_seeds(setting, own, one_seed, report)


def _require_rising(name: str, values: Sequence[float]) -> None:
    if not values or min(values) <= 0 or sorted({*values}) != [*values]:
        raise ValueError(
            f"Expected argument `{name}` to be rising numbers above 0 but got {list(values)}."
        )


def _one_seed(
    setting: Setting,
    folder: Path,
    seed: int,
    found: Sequence[Variant],
    l0: float,
    questions: Questions,
) -> list[Row]:
    """Train and measure all SAEs of a seed, or read what was done before."""
    saes = train(setting, folder, found, seed, l0)

    def figures() -> dict[str, Any]:
        began = time.perf_counter()
        data = setting.held_out()
        measured = measure(saes, data, questions, setting.held_out_tokens)
        seconds = time.perf_counter() - began
        sys.stderr.write(f"seed {seed}: measured {len(measured)} SAEs in {seconds:.0f} s\n")
        return {name: without_nan(row) for name, row in measured.items()}

    measured = computed_once(folder / "figures.json", figures)
    return [
        variant.row() | {"seed": seed} | measured[variant.name]
        for variant in found
        if variant.name in measured
    ]
