"""Plots of the study of low activations."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from lightning_sae.studies.low_activations.costs import names, of_way
from lightning_sae.studies.low_activations.measure import WAYS, WHOLE
from lightning_sae.studies.shared.plots import Point, curves, name_point, panels, save
from lightning_sae.studies.shared.rows import Row, distinct, select, spread

L0_TICKS = (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)
CE_LABEL = "cross-entropy with the reconstruction, nats per token"


def draw_ways(points: Sequence[Row], path: Path) -> Path:
    """Cross-entropy, divergence and error against L0, of all SAEs and ways."""
    figure, found = panels(3, width=4.2, height=4.2)
    labels = {
        "ce": CE_LABEL,
        "kl": "KL divergence, nats per token",
        "mse": "squared error, raw units squared",
    }
    measured = [way for way in WAYS if select(points, way=way)]
    for axes, (name, label) in zip(found, labels.items(), strict=True):
        for sae in names(points):
            series = {WAYS[way]: _means(points, sae, way, name) for way in measured}
            spreads = {WAYS[way]: _spreads(points, sae, way, name) for way in measured}
            curves(
                axes, series, spread=spreads, x="L0, latents per token", y=label, logarithmic=True
            )
        _label_once(axes)
        _cut_the_highest(axes, points, name)
        whole = [_means(points, sae, WHOLE, name)[0] for sae in names(points)]
        for sae, point in zip(names(points), whole, strict=True):
            name_point(axes, point, sae)
        axes.plot(*zip(*whole, strict=True), "ko", markersize=6, zorder=5, label="nothing removed")
        _plain_numbers(axes)
    ratio = mean(point["mse"] / point["fvu"] for point in points)
    right = found[-1].secondary_yaxis("right", functions=(lambda y: y / ratio, lambda y: y * ratio))
    right.set_ylabel("FVU", fontsize=9)
    right.tick_params(labelsize=8)
    handles, words = found[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return save(figure, path)


def draw_kinds(points: Sequence[Row], families: Mapping[str, str], path: Path) -> Path:
    """Cross-entropy against L0 of each kind's sweep, and of its SAEs under a threshold."""
    kinds = list(dict.fromkeys(families.values()))
    columns = min(4, len(kinds))
    figure, found = panels(columns, -(-len(kinds) // columns), width=3.4, height=3.4)
    for axes in found[len(kinds) :]:
        axes.remove()
    for axes, kind in zip(found, kinds, strict=False):
        own = [sae for sae in names(points) if families[sae] == kind]
        series = {
            f"{place + 1}": _means(points, sae, "global", "ce") for place, sae in enumerate(own)
        }
        curves(axes, series, x="L0, latents per token", y="cross-entropy, nats", logarithmic=True)
        whole = [_means(points, sae, WHOLE, "ce")[0] for sae in own]
        axes.plot(*zip(*whole, strict=True), "k-", marker="o", linewidth=1.6)
        for sae, point in zip(own, whole, strict=True):
            name_point(axes, point, sae)
        axes.set_title(kind, fontsize=9)
    shown = found[: len(kinds)]
    left, right = zip(*(axes.get_xlim() for axes in shown), strict=True)
    low, high = zip(*(axes.get_ylim() for axes in shown), strict=True)
    for axes in shown:
        axes.set_xlim(min(left), max(right))
        axes.set_ylim(min(low), max(high))
        _plain_numbers(axes)
        for drawn in axes.containers:
            drawn.set_label("_")
    return save(figure, path)


def draw_frontier(points: Sequence[Row], families: Mapping[str, str], path: Path) -> Path:
    """Cross-entropy and error against L0, of the sweep and of its SAEs under a threshold."""
    figure, found = panels(2, width=5.0, height=4.4)
    for axes, (name, label) in zip(found, (("ce", CE_LABEL), ("fvu", "FVU")), strict=True):
        order = names(points)
        series = {f"{sae}, low ones removed": _means(points, sae, "global", name) for sae in order}
        curves(axes, series, x="L0, latents per token", y=label, logarithmic=True)
        for place, family in enumerate(dict.fromkeys(families.values())):
            whole = [_means(points, s, WHOLE, name)[0] for s in order if families[s] == family]
            style = ("-", "--", ":")[place % 3]
            words = f"as trained{', ' + family if family else ''}"
            axes.plot(
                *zip(*whole, strict=True), f"k{style}", marker="o", linewidth=1.6, label=words
            )
        _plain_numbers(axes)
    return save(figure, path)


def _levels(points: Sequence[Row], sae: str, way: str, name: str) -> list[list[Point]]:
    """For each level, from nothing removed on, L0 and a figure of each seed."""
    own = of_way(points, sae, way)
    shares = sorted(distinct(own, "share"))
    return [[(p["l0"], p[name]) for p in own if p["share"] == share] for share in shares]


def _means(points: Sequence[Row], sae: str, way: str, name: str) -> list[Point]:
    return [_of_seeds(mean, level) for level in _levels(points, sae, way, name)]


def _spreads(points: Sequence[Row], sae: str, way: str, name: str) -> list[Point]:
    return [_of_seeds(spread, level) for level in _levels(points, sae, way, name)]


def _of_seeds(of: Callable[[Sequence[float]], float], level: Sequence[Point]) -> Point:
    l0, figures = zip(*level, strict=True)
    return of(l0), of(figures)


def _cut_the_highest(axes: Axes, points: Sequence[Row], name: str) -> None:
    """Cut the axis above the second most costly way, because the most costly dwarfs the others."""
    ways = [way for way in distinct(points, "way") if way != WHOLE]
    highest = sorted(max(p[name] for p in select(points, way=way)) for way in ways)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 1.05 * highest[-2:][0]))


def _label_once(axes: Axes) -> None:
    """Leave one legend entry of each label."""
    seen: set[str] = set()
    for drawn in axes.containers:
        if drawn.get_label() in seen:
            drawn.set_label("_")
        seen.add(str(drawn.get_label()))


def _plain_numbers(axes: Axes) -> None:
    """Write L0 as plain numbers instead of powers of ten."""
    low, high = axes.get_xlim()
    ticks = [tick for tick in L0_TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
