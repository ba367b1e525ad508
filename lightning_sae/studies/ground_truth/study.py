"""The study of ground truth: which architecture recovers the most known features?"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_sae.architectures.decoder_norm import require_init_norm
from lightning_sae.checks import require_at_least, require_positive
from lightning_sae.studies.ground_truth.measure import held_out, measure
from lightning_sae.studies.ground_truth.report import report
from lightning_sae.studies.ground_truth.settings import ARCHITECTURES, COMPARED, RECIPE, World
from lightning_sae.studies.ground_truth.train import ArchitectureRun, train
from lightning_sae.studies.shared.folder import computed_once, open_folder
from lightning_sae.studies.shared.page import publish
from lightning_sae.studies.shared.pool import Report, run_all
from lightning_sae.studies.shared.rows import Row


def ground_truth(
    architectures: str = COMPARED,
    l0: str = "4,8,16",
    n_features: int = 256,
    d_in: int = 64,
    d_sae: int = 256,
    noise: float = 0.0,
    rare_magnitude: float = 1.0,
    samples: int = 1_000_000,
    seeds: int = 3,
    decoder_norm: Literal["unit", "free"] | None = None,
    decoder_init_norm: float = 1.0,
    output: str = "runs/ground-truth",
    workers: int | None = None,
) -> None:
    """Train every architecture to the same L0 on the same toy data, and rank them by recovery.

    Features lie in superposition, fire by Zipf's law, and most of them only where their parent
    does. Where L0 follows from a penalty, its coefficient is adjusted during training to reach the
    target. The study writes `results.json` and `results.csv`, `pareto.png`, `report.html` with the
    picture in it, and a file for each run. Started again with the same world and recipe, it trains
    only the runs that are missing.

    Args:
        architectures: Which of relu, sqrt, tied, gated, rescale-shift, jumprelu, topk, batchtopk
            and matryoshka, with commas between them.
        l0: Target numbers of active latents, with commas between them.
        n_features: Features of the world.
        d_in: Width of the activations.
        d_sae: Latents of each SAE.
        noise: Standard deviation of noise on each coordinate; features have magnitude 1 on average.
        rare_magnitude: Mean magnitude of the rarest feature; the most frequent has 1, and it is a
            power law of the rank between. Above 1, rare features are strong.
        samples: Activations that each SAE is trained on.
        seeds: SAEs of each kind, with seeds from 0 on; world and weights follow from the seed.
        decoder_norm: Whether decoder rows of all SAEs have norm 1 (`unit`) or any (`free`); null
            for the best choice of each architecture: `unit` where a penalty depends on how strong
            latents are.
        decoder_init_norm: Initial norm of decoder rows whose norm is free.
        output: A new or empty folder, or that of a study with this world and recipe.
        workers: SAEs trained at one time, each in a process with one thread; by default one for
            each core.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    names, targets = _names(architectures), _targets(l0, d_sae)
    require_at_least(2, n_features=n_features, d_in=d_in, d_sae=d_sae)
    require_at_least(1, samples=samples, seeds=seeds, workers=workers)
    require_positive(rare_magnitude=rare_magnitude)
    require_init_norm(decoder_init_norm, decoder_norm or "free")
    world = World(n_features, d_in, noise, rare_magnitude)
    world.data(0)  # raises if there are no such features
    settings: dict[str, Any] = {
        "world": asdict(world),
        "d_sae": d_sae,
        "samples": samples,
        "recipe": RECIPE,
        "entrants": {name: str(kind.settings) for name, kind in ARCHITECTURES.items()},
        "decoder_norm": decoder_norm,
        **({} if decoder_init_norm == 1 else {"decoder_init_norm": decoder_init_norm}),
    }
    folder = open_folder(output, settings)
    norms = decoder_norm, decoder_init_norm
    runs = [
        ArchitectureRun(name, target, seed, world, d_sae, samples, *norms)
        for seed in range(seeds)
        for target in targets
        for name in names
    ]
    began = time.perf_counter()
    rows = run_all(partial(one_run, folder=folder / "runs"), runs, workers)
    of = f"from {len(runs)} SAEs, in {time.perf_counter() - began:.0f} s"
    publish(report(folder, settings, rows), folder, of)


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


def one_run(run: ArchitectureRun, report: Report, folder: Path) -> Row:
    """Train and measure the SAE of a run, or read its existing figures."""
    path = folder / f"{run.name}.json"
    if path.is_file():
        report(run.samples)
    return dict(computed_once(path, lambda: _result(run, report)))


def _result(run: ArchitectureRun, report: Report) -> Row:
    data = run.world.data(run.seed)
    began = time.process_time()
    sae = train(run, data, report)
    seconds = time.process_time() - began
    return {
        "architecture": run.architecture,
        "target_l0": run.l0,
        "seed": run.seed,
        **measure(sae, held_out(data), data.features, data.pairs),
        "coefficient": None if sae.coefficient_name is None else sae.weight_of_penalty(),
        "seconds": seconds,
    }
