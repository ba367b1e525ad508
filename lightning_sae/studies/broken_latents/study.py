"""The study of broken latents: when does a latent mix features?"""

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_sae.architectures.decoder_norm import require_init_norm
from lightning_sae.checks import require_positive
from lightning_sae.data.toy.stream import seed_of
from lightning_sae.studies.broken_latents import plots
from lightning_sae.studies.broken_latents.measure import SAMPLES, Measured, measure
from lightning_sae.studies.broken_latents.overhead import overhead
from lightning_sae.studies.broken_latents.report import report
from lightning_sae.studies.broken_latents.settings import EXPERIMENTS, Experiment
from lightning_sae.studies.broken_latents.train import ExperimentRun, train
from lightning_sae.studies.shared.folder import computed_once, open_folder
from lightning_sae.studies.shared.page import publish
from lightning_sae.studies.shared.plots import save
from lightning_sae.studies.shared.pool import Report, run_all
from lightning_sae.studies.shared.rows import Row


def broken_latents(
    experiments: str = "1,2,3,4,5,6,7",
    samples: int | None = None,
    seeds: int | None = None,
    output: str = "runs/broken-latents",
    workers: int | None = None,
    decoder_norm: Literal["unit", "free"] = "unit",
    decoder_init_norm: float = 1.0,
) -> None:
    """Repeat the experiments of "Broken latents" and compare each with what the document reports.

    Small SAEs, untied, tied, and tied with the auxiliary loss of orthogonality, are trained on toy
    worlds whose features are known. The study writes `results.json`, `report.html` with all
    pictures in it, and a folder for each SAE as soon as it is trained. Experiments 1 to 7 are the
    document's; 8 and 9 go beyond it: peaks that overlap, and the inverse of the loss. Source:
    Chanin et al., Broken latents: studying SAEs and feature co-occurrence in toy models (2024).

    Args:
        experiments: Which of the nine, as numbers with commas between them.
        samples: Activations that each SAE is trained on; by default 2 to 8 million, by experiment.
            The document has 150 million.
        seeds: SAEs of each kind, with seeds from 0 on; world and weights follow from the seed. By
            default 3, and 5 in experiments 8 and 9.
        output: A new or empty folder, or that of this study with the same `samples` and norms,
            which then resumes.
        workers: SAEs trained at one time, each in a process with one thread; by default one for
            each core.
        decoder_norm: `unit` keeps decoder rows at norm 1; `free` weights the penalty by their norms
            instead, as in SAELens.
        decoder_init_norm: Initial norm of rows that are `free`; 0.1 in SAELens.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    chosen = _chosen(experiments)
    sizes = {"samples": samples, "seeds": seeds, "workers": workers}
    require_positive(**{name: value for name, value in sizes.items() if value is not None})
    require_init_norm(decoder_init_norm, decoder_norm)
    decoder = {"decoder_norm": decoder_norm, "decoder_init_norm": decoder_init_norm}
    folder = open_folder(output, {"samples": samples} | (decoder if decoder_norm == "free" else {}))
    new = partial(ExperimentRun, decoder_norm=decoder_norm, decoder_init_norm=decoder_init_norm)
    runs = [
        new(experiment, variant, seed, samples or experiment.samples)
        for seed in range(seeds or max(experiment.seeds for experiment in chosen))
        for experiment in chosen
        if seed < (seeds or experiment.seeds)
        for variant in experiment.variants
    ]
    step = overhead(runs[0])
    began = time.perf_counter()
    rows = run_all(partial(one_run, folder=folder), runs, workers)
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "step": step, "decoder": decoder, "runs": rows}
    page = report(folder, chosen, found)
    publish(page, folder, f"and the pictures of {len(runs)} SAEs, in {seconds:.0f} s")


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


def one_run(run: ExperimentRun, report: Report, folder: Path) -> Row:
    """Train, measure and plot the SAE of a run, or read its existing result."""
    path = folder / run.name / "result.json"
    if path.is_file():
        report(run.samples)
    return dict(computed_once(path, lambda: _result(run, report, folder)))


def _result(run: ExperimentRun, report: Report, folder: Path) -> Row:
    sae, world, seconds = train(run, report)
    generator = torch.Generator().manual_seed(seed_of(run.seed, "study"))
    sample = world.sample(SAMPLES, generator)
    with torch.no_grad():
        f = sae.encode(sample.x)
    measured = measure(sae, world, sample, f)
    pictures = {
        "cosines": plots.cosines(measured, run.variant.tied),
        "activations": plots.activations(measured, sample, f),
        "firings": plots.firings(measured, sample, f),
    }
    for name, picture in pictures.items():
        save(picture, folder / run.name / f"{name}.png")
    return {
        "experiment": run.experiment.number,
        "variant": run.variant.name,
        "seed": run.seed,
        "samples": run.steps * world.batch_size,
        "seconds": round(seconds, 1),
        **_figures(measured),
        "verdict": _verdict(run, measured),
        "pictures": {name: f"{run.name}/{name}.png" for name in pictures},
    }


def _figures(measured: Measured) -> dict[str, Any]:
    """The measurements, as plain values."""
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


def _verdict(run: ExperimentRun, measured: Measured) -> dict[str, Any]:
    """The document's result, and whether it was reproduced."""
    checks = [{"expected": c.words, "met": c.met(measured)} for c in run.variant.checks]
    return {
        "reported": run.variant.reported,
        "checks": checks,
        "met": all(check["met"] for check in checks),
    }
