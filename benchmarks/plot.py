"""Plot the time of a step against the number of latents."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import formatting
from benchmarks.formatting import Row
from benchmarks.libraries.base import OURS
from benchmarks.report import NAMES

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # distinguishable if colour-blind
MARKERS = "osD^v"


def draw(growth: Row, path: Path) -> bool:
    """Plot the growth section to a file; returns False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    names = list(dict.fromkeys(formatting.name(row) for row in growth["rows"]))
    looks = dict(zip(names, zip(COLOURS, MARKERS, strict=True), strict=False))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, architecture in zip(
        figure.subplots(1, 2, sharey=True), ("relu", "topk"), strict=True
    ):
        rows = [row for row in growth["rows"] if row["architecture"] == architecture]
        for name, (colour, marker) in looks.items():
            line(axes, name, (row for row in rows if formatting.name(row) == name), colour, marker)
        floor(axes, growth["floors"])
        dress(axes, NAMES[architecture], [row["d_sae"] for row in growth["floors"]])
    figure.axes[0].set_ylabel("seconds of a step")
    figure.savefig(path, dpi=150)
    return True


def line(axes: Any, name: str, rows: Iterable[Row], colour: str, marker: str) -> None:
    """Add the line of one contender, without the sizes at which it failed."""
    points = [(row["d_sae"], row["seconds"]["median"]) for row in rows if "seconds" in row]
    if points:
        width = 2.5 if name == OURS else 1.5
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, lw=width, label=name)


def floor(axes: Any, floors: Iterable[Row]) -> None:
    """Add the line of the floor: the encoder's product and one pass of Adam."""
    points = [(row["d_sae"], row["seconds"]["median"]) for row in floors if "seconds" in row]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color="0.4", ls="--", lw=1.2, label="encoder's product and Adam")


def dress(axes: Any, title: str, sizes: list[int]) -> None:
    """Set scales, ticks, grid and legend."""
    axes.set(xscale="log", yscale="log", title=title, xlabel="latents")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
