"""The study of broken latents: experiments on toy worlds, and what they show."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_sae.data.toy.stream import seed_of
from lightning_sae.studies.broken_latents import plots as drawing
from lightning_sae.studies.broken_latents.experiments import EXPERIMENTS, Experiment
from lightning_sae.studies.broken_latents.measure import SAMPLES, Measured, measure
from lightning_sae.studies.broken_latents.overhead import overhead
from lightning_sae.studies.broken_latents.report import cost_in_words, summary, write_report
from lightning_sae.studies.shared.pool import ProgressLine, cores, run_all
from lightning_sae.studies.shared.toy_training import Run, train


def broken_latents(
    experiments: str = "1,2,3,4,5,6,7",
    samples: int | None = None,
    seeds: int | None = None,
    output: str = "runs/broken-latents",
    workers: int | None = None,
) -> None:
    """Repeat the experiments of "Broken latents" and say what each shows against the document.

    Small SAEs, untied, tied, and tied with the auxiliary loss of orthogonality, are trained on toy
    worlds whose features are known. Written are `results.json`, `report.html` with all pictures in
    it, and a folder for each SAE, as soon as it is trained. Experiments 1 to 7 are the document's;
    8 and 9 go beyond it: peaks that overlap, and the inverse of the loss. Source: Chanin et al.,
    Broken latents: studying SAEs and feature co-occurrence in toy models (2024).

    Args:
        experiments: Which of the nine, as numbers with commas between them.
        samples: Activations that each SAE is trained on; by default 2 to 8 million, by experiment.
            The document has 150 million.
        seeds: SAEs of each kind, with seeds from 0 on; world and weights follow from the seed. By
            default 3, and 5 in experiments 8 and 9.
        output: A new or empty folder.
        workers: SAEs trained at one time, each in a process with one thread; by default one for
            each core.

    Raises:
        ValueError: If an argument is out of range or `output` is not empty.
    """
    chosen = _chosen(experiments)
    _require_positive(samples=samples, seeds=seeds, workers=workers)
    folder = _new_folder(output)
    runs = [
        Run(experiment, variant, seed, samples or experiment.samples, folder)
        for seed in range(seeds or max(experiment.seeds for experiment in chosen))
        for experiment in chosen
        if seed < (seeds or experiment.seeds)
        for variant in experiment.variants
    ]
    step = overhead(runs[0])
    line = ProgressLine(sum(run.samples for run in runs), len(runs))
    began = time.perf_counter()
    results = run_all(one_run, runs, line, min(workers or cores(), len(runs)))
    seconds = time.perf_counter() - began
    path = folder / "results.json"
    path.write_text(
        json.dumps({"seconds": seconds, "step": step, "runs": results}, indent=1) + "\n"
    )
    page = write_report(folder, chosen, results, cost_in_words(step))
    made = f"Made: {path}, {page} and the pictures of {len(runs)} SAEs, in {seconds:.0f} s."
    sys.stdout.write("\n".join([*summary(chosen, results), "", cost_in_words(step), made]) + "\n")


def _chosen(experiments: str) -> list[Experiment]:
    known = {str(experiment.number): experiment for experiment in EXPERIMENTS}
    names = [name.strip() for name in experiments.split(",")]
    wrong = [name for name in names if name not in known]
    if wrong or len({*names}) < len(names):
        raise ValueError(
            f"Expected argument `experiments` to be different numbers of {', '.join(known)} with "
            f"commas between them but got {experiments!r}."
        )
    return [known[name] for name in names]


def _require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"Expected argument `{name}` to be positive but got {value}.")


def _new_folder(output: str) -> Path:
    folder = Path(output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(
            f"Expected argument `output` to be a new or empty folder but got {output}, which is "
            "not: name another one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def one_run(run: Run, report: Callable[[int], None]) -> dict[str, Any]:
    """Train, measure and draw the SAE of a run; its part of `results.json`."""
    trained = train(run, report)
    generator = torch.Generator().manual_seed(seed_of(run.seed, "study"))
    sample = trained.world.sample(SAMPLES, generator)
    with torch.no_grad():
        f = trained.sae.encode(sample.x)
    measured = measure(trained.sae, trained.world, sample, f)
    figures = {
        "cosines": drawing.cosines(measured, run.variant.tied),
        "activations": drawing.activations(measured, sample, f),
        "firings": drawing.firings(measured, sample, f),
    }
    folder = run.output / run.name
    folder.mkdir()
    for name, figure in figures.items():
        drawing.save(figure, folder / f"{name}.png")
    result = {
        "experiment": run.experiment.number,
        "variant": run.variant.name,
        "seed": run.seed,
        "samples": run.steps * trained.world.batch_size,
        "seconds": round(trained.seconds, 1),
        **_figures(measured),
        "verdict": _verdict(run, measured),
        "pictures": {name: f"{run.name}/{name}.png" for name in figures},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _figures(measured: Measured) -> dict[str, Any]:
    """What was measured, as plain values."""
    alive = measured.alive
    features = measured.features.tolist()
    return {
        "decoder_cosines": _rounded(measured.decoder),
        "encoder_cosines": _rounded(measured.encoder),
        "max_abs_cosine": _rounded(measured.best),
        "feature": features,
        "alive": alive.tolist(),
        "matched_features": sorted({i for i, lives in zip(features, alive, strict=True) if lives}),
        "frequency": _rounded(measured.frequency),
        "peaks": measured.peaks.tolist(),
        "overlap": _rounded(measured.overlap),
        "parent_silent_with_child": measured.parent_silent,
        "parent_silent_without_child": measured.parent_silent_alone,
        "parent_in_child_cosine": measured.parent_in_child,
        "squared_error": measured.squared_error,
        "l0": measured.l0,
    }


def _rounded(values: torch.Tensor, digits: int = 4) -> list[Any]:
    return torch.round(values.double(), decimals=digits).tolist()


def _verdict(run: Run, measured: Measured) -> dict[str, Any]:
    """What the document reports, and whether it was seen."""
    checks = [{"expected": c.words, "met": c.met(measured)} for c in run.variant.checks]
    return {
        "reported": run.variant.reported,
        "checks": checks,
        "met": all(check["met"] for check in checks),
    }
