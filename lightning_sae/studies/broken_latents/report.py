"""What a study found: a table for the terminal, and one HTML page that needs no other file."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_sae.studies.broken_latents.experiments import Experiment, Variant

Result = dict[str, Any]
"""A run's part of `results.json`."""


def summary(experiments: Sequence[Experiment], results: Sequence[Result]) -> Iterator[str]:
    """Each expectation of each kind of SAE, and by how many seeds it was met."""
    for experiment in experiments:
        yield f"\n{experiment.number}. {experiment.title}"
        for variant in experiment.variants:
            own = _of(experiment, variant, results)
            yield f"   {variant.name}: {variant.reported}"
            for words, met in _checks(own):
                yield f"     {_count(met):>8}  {words}"
            for result in own:
                yield f"               seed {result['seed']}: {_latents_in_words(result)}"


def write_report(
    folder: Path, experiments: Sequence[Experiment], results: Sequence[Result], cost: str
) -> Path:
    """Write `report.html`, with the pictures that lie in `folder` in it."""
    environment = Environment(
        loader=PackageLoader("lightning_sae.studies.broken_latents", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    template = environment.get_template("page.html.jinja")
    shown = [_section(folder, experiment, results) for experiment in experiments]
    path = folder / "report.html"
    path.write_text(template.render(experiments=shown, cost=cost), encoding="utf-8")
    return path


def cost_in_words(step: dict[str, float]) -> str:
    """What `overhead` measured."""
    return (
        f"A step takes {step['trainer_microseconds']:,} microseconds of a processor, of which "
        f"Lightning's Trainer {step['share_of_lightning']:.0%}: in a plain loop it takes "
        f"{step['plain_microseconds']:,}."
    )


def _of(experiment: Experiment, variant: Variant, results: Sequence[Result]) -> list[Result]:
    key = (experiment.number, variant.name)
    return [result for result in results if (result["experiment"], result["variant"]) == key]


def _checks(results: Sequence[Result]) -> Iterator[tuple[str, list[bool]]]:
    """What is expected, and whether each seed met it."""
    for checks in zip(*(result["verdict"]["checks"] for result in results), strict=True):
        yield checks[0]["expected"], [check["met"] for check in checks]


def _count(met: Sequence[bool]) -> str:
    return f"{sum(met)} of {len(met)}"


def _latents_in_words(result: Result) -> str:
    """The feature of each living latent, its |cosine|, and its peaks where there are several."""
    parts = [
        f"{latent['feature']} ({latent['cosine']:.2f}"
        + (f", {latent['peaks']} peaks)" if latent["peaks"] > 1 else ")")
        for latent in sorted(_latents(result), key=lambda latent: latent["feature"])
        if latent["alive"]
    ]
    n_dead = len(result["alive"]) - len(parts)
    return ", ".join(parts) + (f"; {n_dead} dead" if n_dead else "")


def _latents(result: Result) -> list[dict[str, Any]]:
    columns = ("feature", "max_abs_cosine", "peaks", "overlap", "frequency", "alive")
    names = ("feature", "cosine", "peaks", "overlap", "frequency", "alive")
    rows = zip(*(result[column] for column in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _section(folder: Path, experiment: Experiment, results: Sequence[Result]) -> dict[str, Any]:
    variants = []
    for variant in experiment.variants:
        own = _of(experiment, variant, results)
        variants.append(
            {
                "name": variant.name,
                "reported": variant.reported,
                "checks": [(words, _count(met), all(met)) for words, met in _checks(own)],
                "settings": _settings(experiment.world | variant.world)
                + f"; {own[0]['samples'] / 1e6:g} million activations",
                "runs": [_run(folder, result) for result in own],
            }
        )
    return {
        "number": experiment.number,
        "title": experiment.title,
        "d_sae": experiment.d_sae,
        "l1_coefficient": experiment.l1_coefficient,
        "variants": variants,
    }


def _settings(world: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in world.items())


def _run(folder: Path, result: Result) -> dict[str, Any]:
    return {
        "seed": result["seed"],
        "met": result["verdict"]["met"],
        "checks": result["verdict"]["checks"],
        "latents": _latents(result),
        "pictures": {
            name: "data:image/png;base64," + base64.b64encode((folder / path).read_bytes()).decode()
            for name, path in result["pictures"].items()
        },
        "facts": _facts(result),
    }


def _facts(result: Result) -> str:
    facts = f"squared error {result['squared_error']:.4g}, L0 {result['l0']:.3g}"
    if result["parent_silent_with_child"] is not None:
        facts += (
            f"; of the first child and its parent: the parent's latent is silent on "
            f"{result['parent_silent_with_child']:.0%} of samples with both and on "
            f"{result['parent_silent_without_child']:.0%} of those with the parent alone; cosine "
            f"of the child's latent with the parent {result['parent_in_child_cosine']:.2f}"
        )
    return f"{facts}; trained in {result['seconds']:.0f} s"
