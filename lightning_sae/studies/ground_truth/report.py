"""The league table: for the terminal, as a picture, and as one page of HTML."""

import base64
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_sae.studies.ground_truth.league import ARCHITECTURES

Result = dict[str, Any]
"""A run's part of `results.json`."""

COLUMNS = {
    "l0": ("L0", ".1f"),
    "mcc": ("MCC", ".3f"),
    "f1": ("F1", ".3f"),
    "fvu": ("FVU", ".4f"),
    "shrinkage": ("shrinkage", ".2f"),
    "dead": ("dead", ".3f"),
    "seconds": ("CPU s", ".1f"),
}
"""Figures of the table: heading and format."""

COLORS = {
    "relu": "#2f6db5",
    "sqrt": "#6aa5dd",
    "tied": "#8a6d4b",
    "gated": "#3f9b57",
    "jumprelu": "#b8433d",
    "topk": "#e08a1e",
    "batchtopk": "#7d5fb2",
    "matryoshka": "#d478b4",
}
MARKERS = dict(zip(COLORS, "ovsDP^X*", strict=True))


def standings(results: Sequence[Result]) -> dict[int, list[Result]]:
    """For each wished L0 the architectures, best MCC first: mean and spread over seeds.

    Spread is the standard deviation of a sample; None for a single seed.
    """
    table: dict[int, list[Result]] = {}
    for target in sorted({result["target_l0"] for result in results}):
        rows = []
        for name in ARCHITECTURES:
            own = [r for r in results if (r["target_l0"], r["architecture"]) == (target, name)]
            if own:
                rows.append(_row(name, own))
        table[target] = sorted(rows, key=lambda row: -row["mean"]["mcc"])
    return table


def _row(name: str, results: Sequence[Result]) -> Result:
    figures = {key: [r[key] for r in results] for key in results[0] if _is_figure(results[0][key])}
    return {
        "architecture": name,
        "title": ARCHITECTURES[name].title,
        "seeds": len(results),
        "mean": {key: statistics.mean(values) for key, values in figures.items()},
        "spread": {
            key: statistics.stdev(values) if len(values) > 1 else None
            for key, values in figures.items()
        },
    }


def _is_figure(value: Any) -> bool:
    return isinstance(value, float)


def cells(row: Result) -> list[str]:
    """The figures of a row as text."""
    return [
        _with_spread(row["mean"][key], row["spread"][key], form)
        for key, (_, form) in COLUMNS.items()
    ]


def _with_spread(mean: float, spread: float | None, form: str) -> str:
    return f"{mean:{form}}" if spread is None else f"{mean:{form}} ± {spread:{form}}"


def summary(results: Sequence[Result]) -> Iterator[str]:
    """The tables for the terminal."""
    for target, rows in standings(results).items():
        table = [[row["title"], *cells(row)] for row in rows]
        table.insert(0, ["", *(heading for heading, _ in COLUMNS.values())])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        yield f"\nL0 {target} wished for; mean ± spread of {rows[0]['seeds']} seeds"
        for first, *others in table:
            figures = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
            yield "  ".join([first.ljust(widths[0]), *figures])


def draw(results: Sequence[Result]) -> Figure:
    """FVU, MCC and F1 against the L0 reached; bars are the spread over seeds."""
    table = standings(results)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    words = (("fvu", "FVU: lower is better"), ("mcc", "MCC"), ("f1", "F1"))
    for axes, (key, label) in zip(panels, words, strict=True):
        for name in ARCHITECTURES:
            own = [r for rows in table.values() for r in rows if r["architecture"] == name]
            if own:
                _curve(axes, name, key, own)
        true = statistics.mean(result["true_l0"] for result in results)
        axes.axvline(true, color="#9aa3ad", linestyle=":", linewidth=1)
        axes.text(true, 0, " features\n that fire", transform=axes.get_xaxis_transform(),
                  va="bottom", fontsize=7, color="#5b6673")  # fmt: skip
        axes.set_xlabel("L0 on held-out samples")
        axes.set_title(label, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _curve(axes: Axes, name: str, key: str, rows: Sequence[Result]) -> None:
    rows = sorted(rows, key=lambda row: row["mean"]["l0"])
    axes.errorbar(
        [row["mean"]["l0"] for row in rows],
        [row["mean"][key] for row in rows],
        xerr=[row["spread"]["l0"] or 0.0 for row in rows],
        yerr=[row["spread"][key] or 0.0 for row in rows],
        color=COLORS[name],
        marker=MARKERS[name],
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
        label=ARCHITECTURES[name].title,
    )


def write_report(folder: Path, settings: dict[str, Any], results: Sequence[Result]) -> Path:
    """Write `report.html`, with the folder's `pareto.png` in it."""
    environment = Environment(
        loader=PackageLoader("lightning_sae.studies.ground_truth", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    picture = base64.b64encode((folder / "pareto.png").read_bytes()).decode()
    page = environment.get_template("page.html.jinja").render(
        picture=f"data:image/png;base64,{picture}",
        headings=[heading for heading, _ in COLUMNS.values()],
        tables={
            target: [(row["title"], cells(row)) for row in rows]
            for target, rows in standings(results).items()
        },
        settings=settings,
        true_l0=statistics.mean(result["true_l0"] for result in results),
        runs=results,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
