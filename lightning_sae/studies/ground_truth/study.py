"""The study of ground truth: a league table of the architectures on a world that is known."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning_sae.studies.ground_truth.league import ARCHITECTURES, RECIPE, Run, World, one_run
from lightning_sae.studies.ground_truth.report import Result, draw, standings, summary, write_report
from lightning_sae.studies.shared.folder import open_folder, write_csv, write_json
from lightning_sae.studies.shared.pool import ProgressLine, cores, run_all


def ground_truth(
    architectures: str = ",".join(ARCHITECTURES),
    l0: str = "4,8,16",
    n_features: int = 256,
    d_in: int = 64,
    d_sae: int = 256,
    noise: float = 0.0,
    samples: int = 1_000_000,
    seeds: int = 3,
    decoder_norm: Literal["unit", "free"] | None = None,
    output: str = "runs/ground-truth",
    workers: int | None = None,
) -> None:
    """Train every architecture to the same L0 on one toy world, and rank them by what they found.

    Features lie in superposition, fire by Zipf's law, and most of them only where their parent
    does. SAEs whose L0 comes about by a penalty are steered to it. Written are `results.json` and
    `results.csv`, `pareto.png`, `report.html` with the picture in it, and a file for each run:
    started again with the same world and recipe, the study goes on with the runs that are missing.

    Args:
        architectures: Which of relu, sqrt, tied, gated, jumprelu, topk, batchtopk and matryoshka,
            with commas between them.
        l0: Wished numbers of active latents, with commas between them.
        n_features: Features of the world.
        d_in: Width of the activations.
        d_sae: Latents of each SAE.
        noise: Standard deviation of noise on each coordinate; features have magnitude 1 on average.
        samples: Activations that each SAE is trained on.
        seeds: SAEs of each kind, with seeds from 0 on; world and weights follow from the seed.
        decoder_norm: Whether decoder rows of all have norm 1 or any; null for what suits each: 1
            where a penalty sees how strong latents are.
        output: A new or empty folder, or that of a study with this world and recipe.
        workers: SAEs trained at one time, each in a process with one thread; by default one for
            each core.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    names, targets = _names(architectures), _targets(l0, d_sae)
    _require_at_least(2, n_features=n_features, d_in=d_in, d_sae=d_sae)
    _require_at_least(1, samples=samples, seeds=seeds, workers=workers)
    world = World(n_features, d_in, noise)
    world.data(0)  # raises if there is no such world
    settings: dict[str, Any] = {
        "world": asdict(world),
        "d_sae": d_sae,
        "samples": samples,
        "recipe": RECIPE,
        "entrants": {name: str(entrant.settings) for name, entrant in ARCHITECTURES.items()},
        "decoder_norm": decoder_norm,
    }
    folder = open_folder(output, settings)
    (folder / "runs").mkdir(exist_ok=True)
    runs = [
        Run(name, target, seed, world, d_sae, samples, folder / "runs", decoder_norm)
        for seed in range(seeds)
        for target in targets
        for name in names
    ]
    began = time.perf_counter()
    line = ProgressLine(sum(run.samples for run in runs), len(runs))
    results = run_all(one_run, runs, line, min(workers or cores(), len(runs)))
    made = _write(folder, settings, results)
    seconds = time.perf_counter() - began
    last = f"Made: {', '.join(map(str, made))}, from {len(runs)} SAEs, in {seconds:.0f} s."
    sys.stdout.write("\n".join([*summary(results), "", last]) + "\n")


def _names(architectures: str) -> list[str]:
    names = [name.strip() for name in architectures.split(",")]
    if not {*names} <= {*ARCHITECTURES} or len({*names}) < len(names):
        raise ValueError(
            f"Expected argument `architectures` to be different ones of {', '.join(ARCHITECTURES)} "
            f"with commas between them but got {architectures!r}."
        )
    return names


def _targets(l0: str, d_sae: int) -> list[int]:
    words = [word.strip() for word in l0.split(",")]
    targets = [int(word) for word in words if word.isdecimal() and 0 < int(word) < d_sae]
    if len(targets) < len(words) or len({*targets}) < len(targets):
        raise ValueError(
            "Expected argument `l0` to be different whole numbers above 0 and less than "
            f"`d_sae`={d_sae} with commas between them but got {l0!r}."
        )
    return targets


def _require_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"Expected argument `{name}` to be at least {least} but got {value}.")


def _write(folder: Path, settings: dict[str, Any], results: Sequence[Result]) -> list[Path]:
    """Everything the study makes but the runs' own files."""
    everything = {**settings, "table": standings(results), "runs": results}
    made = [
        write_json(folder / "results.json", everything),
        write_csv(folder / "results.csv", results),
        folder / "pareto.png",
    ]
    draw(results).savefig(made[-1], dpi=130, facecolor="white")
    return [*made, write_report(folder, settings, results)]
