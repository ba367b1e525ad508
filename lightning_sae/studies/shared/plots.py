"""Plots in a common style."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

COLORS = ("#2f6db5", "#e08a1e", "#3f9b57", "#b8433d", "#7d5fb2", "#8a6d4b", "#d478b4", "#6f7c85")
MARKERS = "osD^vPX*"

Point = tuple[float, float]


def panels(
    columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return figure, found


def curves(
    axes: Axes,
    series: Mapping[str, Sequence[Point]],
    *,
    x: str,
    y: str,
    spread: Mapping[str, Sequence[Point]] | None = None,
    logarithmic: bool = False,
) -> None:
    """A line with a marker for each point.

    Args:
        axes: Where to draw.
        series: Points by label; colours are assigned in this order, and a series without points
            keeps its colour for other panels.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        spread: Half lengths of the error bars of each point, in both directions.
        logarithmic: Whether the horizontal axis is.
    """
    for place, (label, points) in enumerate(series.items()):
        if not points:
            continue
        errors = (spread or {}).get(label, [(0.0, 0.0)] * len(points))
        pairs = sorted(zip(points, errors, strict=True))
        axes.errorbar(
            [point[0] for point, _ in pairs],
            [point[1] for point, _ in pairs],
            xerr=[error[0] for _, error in pairs],
            yerr=[error[1] for _, error in pairs],
            color=COLORS[place % len(COLORS)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4.5,
            linewidth=1.3,
            elinewidth=0.8,
            label=label,
        )
    if logarithmic:
        axes.set_xscale("log")
        # By default minor ticks of an axis of about one decade are labelled too, and overlap.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x, ylabel=y)


def name_point(axes: Axes, point: Point, name: str) -> None:
    """Write a name beside a point."""
    axes.annotate(
        name, point, xytext=(3, 3), textcoords="offset points", fontsize=6, color="#5b6673"
    )


def save(figure: Figure, path: Path) -> Path:
    """Write an image, with one legend beside the panels if their curves have labels."""
    labelled = [axes for axes in figure.axes if axes.get_legend_handles_labels()[0]]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    if labelled and not any(legends):
        handles, labels = labelled[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    return path
