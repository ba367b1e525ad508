"""A study of a language model from its settings to its report, seed by seed."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_sae.studies.shared.page import Page, publish
from lightning_sae.studies.shared.setting import Setting


def run_seeds(
    setting: Setting,
    own: dict[str, Any],
    one_seed: Callable[[Path, int], Any],
    report: Callable[[Path, dict[str, Any], Sequence[Any]], Page],
    seeds: int | None = None,
) -> None:
    """Open the study's folder, train and measure with each seed, and publish the report.

    Args:
        setting: Model, text and length.
        own: Further settings of the study, as plain values.
        one_seed: Trains and measures; takes the folder of the seed and the seed.
        report: Makes the page from the study's folder, all settings and what `one_seed` returned.
        seeds: Number of repetitions; that of the setting by default.
    """
    folder = setting.open(**own)
    began = time.perf_counter()
    seeds = setting.seeds if seeds is None else seeds
    results = [one_seed(folder / f"seed-{seed}", seed) for seed in range(seeds)]
    page = report(folder, setting.plain() | own, results)
    publish(page, folder, f"in {time.perf_counter() - began:.0f} s")
