"""Tables, picture and page of the study of ground truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning_sae.studies.ground_truth.settings import ARCHITECTURES
from lightning_sae.studies.shared.page import Page, Section, Table, figures_table
from lightning_sae.studies.shared.plots import curves, panels, save
from lightning_sae.studies.shared.rows import Row, distinct, known, select, spread

COLUMNS = {
    "l0": ("L0", ".1f"),
    "mcc": ("MCC", ".3f"),
    "f1": ("F1", ".3f"),
    "fvu": ("FVU", ".4f"),
    "shrinkage": ("shrinkage", ".2f"),
    "dead": ("dead", ".3f"),
    "seconds": ("CPU s", ".1f"),
}
"""Figures of the tables: heading and format."""

NOTE = (
    "Mean and standard deviation over seeds; each seed has its own world. All figures are of "
    "held-out samples. L0: the one reached. MCC: mean |cosine| of decoder rows and features over "
    "their best one-to-one matching. F1: of each latent as a detector of the feature that its "
    "decoder row points along most, dead latents counting 0, mean over latents. FVU: squared error "
    "over variance. Shrinkage: the magnitude a latent gives its feature over the true one, median "
    "over latents. Dead: share of latents that never fire. CPU s: seconds of one core for "
    "training, with drawing the samples."
)


def standings(results: Sequence[Row]) -> dict[int, list[Row]]:
    """For each target L0 the architectures, best MCC first: mean and spread over seeds.

    Spread is the standard deviation of a sample; None for a single seed.
    """
    table = {}
    for target in sorted(distinct(results, "target_l0")):
        own = {name: select(results, target_l0=target, architecture=name) for name in ARCHITECTURES}
        rows = [_standing(name, runs) for name, runs in own.items() if runs]
        table[target] = sorted(rows, key=lambda row: -row["mean"]["mcc"])
    return table


def _standing(name: str, runs: Sequence[Row]) -> Row:
    names = [key for key, value in runs[0].items() if isinstance(value, float)]
    figures = {key: [run[key] for run in runs] for key in names}
    return {
        "architecture": name,
        "title": ARCHITECTURES[name].title,
        "seeds": len(runs),
        "mean": {key: mean(values) for key, values in figures.items()},
        "spread": {
            key: stdev(values) if len(values) > 1 else None for key, values in figures.items()
        },
    }


def _table(target: int, standing: Sequence[Row], results: Sequence[Row]) -> Table:
    names = {row["title"]: row["architecture"] for row in standing}
    own = select(results, target_l0=target)
    groups = {title: select(own, architecture=name) for title, name in names.items()}
    return figures_table(groups, COLUMNS)


def draw(results: Sequence[Row], path: Path) -> Path:
    """FVU, MCC and F1 against the L0 reached; bars are the spread over seeds."""
    figure, found = panels(3, width=4.3, height=4.6)
    labels = {"fvu": "FVU (lower is better)", "mcc": "MCC", "f1": "F1"}
    groups = {
        kind.title: [
            select(results, architecture=name, target_l0=target)
            for target in distinct(select(results, architecture=name), "target_l0")
        ]
        for name, kind in ARCHITECTURES.items()
    }
    true = mean(known(results, "true_l0"))
    for axes, (name, label) in zip(found, labels.items(), strict=True):
        points, spreads = (
            {
                title: [(of(known(runs, "l0")), of(known(runs, name))) for runs in each]
                for title, each in groups.items()
            }
            for of in (mean, spread)
        )
        curves(axes, points, spread=spreads, x="L0 on held-out samples", y=label)
        axes.axvline(true, color="#9aa3ad", linestyle=":", linewidth=1)
        axes.text(true, 0, " features\n that fire", transform=axes.get_xaxis_transform(),
                  va="bottom", fontsize=7, color="#5b6673")  # fmt: skip
    found[0].set_yscale("log")
    return save(figure, path)


def report(folder: Path, settings: Mapping[str, Any], results: Sequence[Row]) -> Page:
    """The study's page."""
    caption = "Figures against the L0 reached; bars are standard deviations over seeds."
    everything = [[_cell(value) for value in row.values()] for row in results]
    runs = Section(f"All {len(results)} runs", tables=[Table(list(results[0]), everything)])
    world, table = settings["world"], standings(results)
    return Page(
        "Ground truth",
        "Which architecture finds the most of the features of a known world at the same L0?",
        [
            f"Every architecture is trained on one world whose features are known: "
            f"{world['n_features']} features in {world['d_in']} dimensions, "
            f"{mean(known(results, 'true_l0')):.1f} of which fire in an activation on average. "
            "Frequencies follow Zipf's law, and seven features of eight fire only where their "
            f"parent does. SAEs have {settings['d_sae']} latents and are trained on "
            f"{settings['samples']:,} activations.",
            "All have the same recipe, with AuxK for dead latents; lengths are shares of the run.",
            NOTE,
        ],
        {**world, "d_sae": settings["d_sae"], "samples": settings["samples"], **settings["recipe"]},
        [
            Section("Against L0", pictures={draw(results, folder / "pareto.png"): caption}),
            *(
                Section(f"L0 {target}", tables=[_table(target, rows, results)])
                for target, rows in table.items()
            ),
            Section("Runs", details=[runs]),
        ],
        results={**settings, "table": table, "runs": results},
        csv={"results": results},
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
