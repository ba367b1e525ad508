"""Tables and page of the study of broken latents."""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from lightning_sae.studies.broken_latents.settings import Experiment, Variant
from lightning_sae.studies.shared.page import Compared, Page, Section, Table
from lightning_sae.studies.shared.rows import Row, select

METHOD = (
    "Small SAEs are trained on toy worlds whose features are known, with several seeds. Each line "
    "of the first table says by how many seeds an expectation was met.",
    "Heat maps show the cosine of each latent's direction with each feature. Histograms show a "
    "latent's activations on 131,072 held-out samples, on a log scale, coloured by which of the "
    "latent's features (|cos| at least .15) fire. Firings are the most frequent patterns of these "
    "features, one sample of each. A peak is a stretch of a histogram of 25 bins between two dips "
    "to half of the lower neighbour, with at least 1 % of the activations; the lowest 15 % is left "
    "out, where interference lies. A latent is dead if it fires, above 1 % of the SAE's largest "
    "activation, on less than one sample in a thousand. Overlap is the common area of the "
    "distributions of a latent's activations where its feature fires and where it does not.",
)


def report(folder: Path, experiments: Sequence[Experiment], results: dict[str, Any]) -> Page:
    """The study's page.

    Args:
        folder: The study's, with the pictures of all SAEs.
        experiments: What was trained.
        results: Seconds that it took, what `overhead` measured as `step`, the arguments of
            `decoder` rows, and all `runs`.
    """
    own = [select(results["runs"], experiment=each.number) for each in experiments]
    pairs = list(zip(experiments, own, strict=True))
    settings = {"all SAEs:": _listed(results["decoder"])}
    settings |= dict(each for experiment in experiments for each in _settings(experiment))
    return Page(
        "Broken latents",
        "When does a latent stand for one feature, and when for a mixture?",
        [*METHOD, cost_in_words(results["step"])],
        settings,
        [_section(folder, *pair) for pair in pairs],
        [row for pair in pairs for row in comparison(*pair)],
        "Chanin et al., Broken latents: studying SAEs and feature co-occurrence in toy models "
        "(2024)",
        results,
    )


def cost_in_words(step: dict[str, float]) -> str:
    """What `overhead` measured."""
    return (
        f"A step takes {step['trainer_microseconds']:,} microseconds of a processor, "
        f"{step['share_of_lightning']:.0%} of them in Lightning's Trainer: in a plain loop it "
        f"takes {step['plain_microseconds']:,}."
    )


def _settings(experiment: Experiment) -> Iterator[tuple[str, str]]:
    sae = f"d_sae {experiment.d_sae}, l1_coefficient {experiment.l1_coefficient}"
    yield f"experiment {experiment.number}:", f"{_listed(experiment.world)}, {sae}"
    for variant in experiment.variants:
        if variant.world | variant.sae:
            name = f"experiment {experiment.number}, {variant.name}:"
            yield name, _listed(variant.world | variant.sae)


def _listed(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())


def comparison(experiment: Experiment, results: Sequence[Row]) -> Iterator[Compared]:
    """The document's result for each kind of SAE, and how many seeds met each check."""
    for variant in experiment.variants:
        verdicts = [row["verdict"] for row in select(results, variant=variant.name)]
        checks = zip(*(verdict["checks"] for verdict in verdicts), strict=True)
        here = [
            f"{sum(check['met'] for check in each)} of {len(each)}: {each[0]['expected']}"
            for each in checks
        ]
        yield f"{experiment.number}, {variant.name}", variant.reported, "; ".join(here)


def _section(folder: Path, experiment: Experiment, results: Sequence[Row]) -> Section:
    in_order = [
        (variant, row)
        for variant in experiment.variants
        for row in select(results, variant=variant.name)
    ]
    rows = [
        [f"{variant.name}, seed {row['seed']}", _verdict(row), _latents_in_words(row)]
        for variant, row in in_order
    ]
    headings = ["SAE", "verdict", "features of alive latents (|cos|, peaks)"]
    return Section(
        f"{experiment.number}. {experiment.title}",
        tables=[Table(headings, rows)],
        details=[_one_sae(folder, variant, row) for variant, row in in_order],
    )


def _verdict(result: Row) -> str:
    return "as expected" if result["verdict"]["met"] else "not as expected"


def _latents_in_words(result: Row) -> str:
    """The feature of each alive latent, its |cosine|, and its peaks where there are several."""
    columns = ("feature", "max_abs_cosine", "peaks", "alive")
    latents = sorted(zip(*(result[name] for name in columns), strict=True), key=itemgetter(0))
    parts = [
        f"{feature} ({cosine:.2f}" + (f", {peaks} peaks)" if peaks > 1 else ")")
        for feature, cosine, peaks, alive in latents
        if alive
    ]
    n_dead = len(latents) - len(parts)
    return ", ".join(parts) + (f"; {n_dead} dead" if n_dead else "")


def _one_sae(folder: Path, variant: Variant, result: Row) -> Section:
    unmet = [check["expected"] for check in result["verdict"]["checks"] if not check["met"]]
    title = f"{variant.name}, seed {result['seed']}: {_verdict(result)}"
    return Section(
        f"{title}{'; not seen: ' if unmet else ''}{'; '.join(unmet)}",
        [_facts(result)],
        [_latents_table(result)],
        {folder / path: name for name, path in result["pictures"].items()},
    )


def _facts(result: Row) -> str:
    facts = (
        f"{result['samples']:,} activations, squared error {result['squared_error']:.4g}, "
        f"L0 {result['l0']:.3g}"
    )
    if result["parent_silent_with_child"] is not None:
        facts += (
            f"; of the first child and its parent: the parent's latent is silent on "
            f"{result['parent_silent_with_child']:.0%} of samples with both and on "
            f"{result['parent_silent_without_child']:.0%} of those with the parent alone; cosine "
            f"of the child's latent with the parent {result['parent_in_child_cosine']:.2f}"
        )
    return f"{facts}; trained in {result['seconds']:.0f} s"


def _latents_table(result: Row) -> Table:
    columns = ("feature", "max_abs_cosine", "peaks", "overlap", "frequency", "alive")
    rows = []
    for latent, values in enumerate(zip(*(result[name] for name in columns), strict=True)):
        feature, cosine, peaks, overlap, frequency, alive = values
        row = [f"{feature}", f"{cosine:.3f}", f"{peaks}", f"{overlap:.0%}", f"{frequency:.1%}"]
        rows.append([f"{latent}", *(row if alive else ["dead", *[""] * 4])])
    return Table(["latent", "feature", "|cos|", "peaks", "overlap", "fires on"], rows)
