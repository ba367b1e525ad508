"""Pictures of the study of broken latents on a language model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes

from lightning_sae.studies.broken_latents_lm.settings import KINDS, NONE, RULES
from lightning_sae.studies.shared.plots import COLORS, MARKERS, panels, save
from lightning_sae.studies.shared.rows import Row, distinct, known, select, spread

MOST_PROPERTIES = 4


def draw_cost(rows: Sequence[Row], path: Path) -> Path:
    """Absorption against the cross-entropy that splicing adds, for each width."""
    widths = distinct(rows, "d_sae")
    figure, found = panels(len(widths), width=4.6, height=3.8)
    for axes, d_sae in zip(found, widths, strict=True):
        own = select(rows, d_sae=d_sae)
        for name in distinct(own, "sae"):
            _point(axes, select(own, sae=name))
        axes.set(xlabel="nats added by splicing", ylabel="absorption fraction")
        axes.set_title(f"{d_sae} latents", fontsize=9)
    rules = [name for name in RULES if select(rows, rule=name)]
    for kind, color in zip(KINDS, COLORS, strict=False):
        found[0].plot([], [], "o", color=color, label=kind)
    for name in rules:
        found[0].plot([], [], _marker(name), color="#5b6673", label=RULES[name].label)
    return save(figure, path)


def _marker(rule: str) -> str:
    return (MARKERS + "<>")[list(RULES).index(rule)]


def _point(axes: Axes, rows: Sequence[Row]) -> None:
    """The mean of seeds, with bars of one standard deviation; larger weights have larger marks."""
    x, y = known(rows, "ce_added"), known(rows, "absorbed")
    if not x or not y:
        return
    first = rows[0]
    axes.errorbar(
        mean(x),
        mean(y),
        xerr=spread(x),
        yerr=spread(y),
        marker=_marker(first["rule"]),
        color=COLORS[list(KINDS).index(first["kind"])],
        markersize=9 if first["rule"] == NONE else 3 + np.log10(first["coefficient"]),
        markerfacecolor="white" if first["rule"] == NONE else None,
        elinewidth=0.7,
    )


def draw_histograms(rows: Sequence[Row], path: Path) -> Path:
    """Activations of the own latents of a few properties, on tokens with and without them.

    Args:
        rows: Of one seed, each for a line of panels.
        path: The image.
    """
    names = most_frequent(rows)
    figure, found = panels(max(1, len(names)), len(rows), width=2.9, height=1.8)
    for line, row in enumerate(rows):
        for column, name in enumerate(names):
            axes = found[line * len(names) + column]
            _histogram(axes, row["properties"].get(name))
            if line == 0:
                axes.set_title(name, fontsize=9)
        if names:
            parts = [row["kind"], RULES[row["rule"]].label]
            parts += [f"weight {row['coefficient']:g}"] if row["coefficient"] else []
            found[line * len(names)].set_ylabel("\n".join([*parts, "firings"]), fontsize=7)
    figure.supxlabel("activation of the property's own latent, over its largest", fontsize=9)
    return save(figure, path)


def most_frequent(rows: Sequence[Row]) -> list[str]:
    """The properties of all rows whose own latents fire most, at most four."""
    shared = [name for name in rows[0]["properties"] if all(name in r["properties"] for r in rows)]
    fired = {name: sum(rows[0]["properties"][name]["with_property"]) for name in shared}
    return sorted(shared, key=lambda name: -fired[name])[:MOST_PROPERTIES]


def _histogram(axes: Axes, of: Row) -> None:
    bins = len(of["with_property"])
    edges = np.linspace(0, 1, bins + 1)
    for side, color, label in (
        ("without", COLORS[1], "without"),
        ("with_property", COLORS[0], "with"),
    ):
        axes.stairs(np.maximum(of[side], 0.5), edges, color=color, label=f"{label} the property")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.axvline(0.7, color="#5b6673", linewidth=0.7, linestyle=":")
