"""Plots of the study of suppression."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_sae.studies.shared.plots import COLORS, MARKERS, panels, save
from lightning_sae.studies.shared.rows import Row, distinct, known, select, spread
from lightning_sae.studies.suppression.train import METHODS, ORIGINAL


def words(method: str) -> str:
    """A method's name in tables and pictures."""
    return method.replace("_", " ")


def short(hooks: Sequence[str]) -> dict[str, str]:
    """Short names of hooks: their layers, where these differ."""
    layers = {hook: re.search(r"blocks\.(\d+)\.(.*)", hook) for hook in hooks}
    if all(layers.values()) and len({found[2] for found in layers.values() if found}) == 1:
        return {hook: f"layer {found[1]}" for hook, found in layers.items() if found}
    return {hook: hook for hook in hooks}


def draw_bars(rows: Sequence[Row], path: Path) -> Path:
    """L2 ratio, L0 and what fine-tuning recovers, as in the document's figures A1 to A3 and 2."""
    figure, axes = panels(2, 2, width=6.2, height=3.4)
    shown = (
        ("l2_ratio", "L2 ratio", (ORIGINAL, *METHODS), 1.0),
        ("l0", "latents firing per token (L0)", (ORIGINAL, *METHODS), None),
        ("mse_removed", "share of squared error removed", METHODS, None),
        ("perplexity_recovered", "share of perplexity gap recovered", METHODS, None),
    )
    for each, (name, label, methods, line) in zip(axes, shown, strict=True):
        _bars(each, rows, name, methods)
        each.set_ylabel(label)
        if line is not None:
            each.axhline(line, color="#1c2430", linewidth=0.8, linestyle="--")
    axes[2].axhline(0, color="#1c2430", linewidth=0.8)
    axes[3].axhline(0, color="#1c2430", linewidth=0.8)
    return save(figure, path)


def _bars(axes: Axes, rows: Sequence[Row], name: str, methods: Sequence[str]) -> None:
    hooks, width = distinct(rows, "hook"), 0.84 / len(methods)
    for place, method in enumerate(methods):
        found = [known(select(rows, hook=hook, method=method), name) for hook in hooks]
        axes.bar(
            [i + (place - (len(methods) - 1) / 2) * width for i in range(len(hooks))],
            [mean(values) for values in found],
            width,
            yerr=[spread(values) for values in found],
            error_kw={"elinewidth": 0.8},
            color=COLORS[(ORIGINAL, *METHODS).index(method)],
            label=words(method),
        )
    labels = short(hooks)
    axes.set_xticks(range(len(hooks)), [labels[hook] for hook in hooks], fontsize=8)
    axes.grid(axis="x", visible=False)


def draw_frequencies(rows: Sequence[Row], path: Path) -> Path:
    """Sorted frequencies at each hook and seed; dead latents are left of a dotted line."""
    hooks = distinct(rows, "hook")
    figure, axes = panels(len(hooks), width=4.0, height=3.4)
    for each, hook in zip(axes, hooks, strict=True):
        own = select(rows, hook=hook)
        for seed in distinct(own, "seed"):
            of_seed = select(own, seed=seed)
            found = sorted((r["frequency"], r["alive"]) for r in of_seed if r["frequency"] > 0)
            silent = len(of_seed) - len(found)
            places = range(silent, silent + len(found))
            logs = [math.log10(frequency) for frequency, _ in found]
            colour = COLORS[seed % len(COLORS)]
            each.plot(places, logs, color=colour, linewidth=1.4, label=f"seed {seed}")
            n_dead = sum(not alive for _, alive in found)
            if n_dead:
                each.axvline(silent + n_dead - 0.5, color=colour, linewidth=0.8, linestyle=":")
        each.set_xlim(0, max(row["latent"] for row in own) + 1)
        each.set_title(short(hooks)[hook], fontsize=9)
        each.set(
            xlabel="latents, sorted (those that never fire left blank)",
            ylabel="log10 of share of tokens",
        )
    return save(figure, path)


def draw_latents(rows: Sequence[Row], path: Path) -> Path:
    """Scaling, addition and cosine of alive latents of one seed, by frequency and strength."""
    hooks = distinct(rows, "hook")
    figure, axes = panels(len(hooks), 3, width=4.4, height=3.3)
    shown = (
        ("scaling", "learned scaling", None),
        ("added", "added to mean activation (raw units)", None),
        ("cosine", "cosine before and after", 0.95),
    )
    for line, (name, label, least) in enumerate(shown):
        for column, hook in enumerate(hooks):
            own = select(rows, hook=hook, alive=True, seed=0)
            each = axes[line * len(hooks) + column]
            _scatter(figure, each, own, name, label, least)
            if line == 0:
                each.set_title(short(hooks)[hook], fontsize=9)
    return save(figure, path)


def _scatter(
    figure: Figure, axes: Axes, rows: Sequence[Row], name: str, label: str, least: float | None
) -> None:
    values = sorted(row[name] for row in rows)
    if not values:
        return
    # The colour range leaves out the outermost latents, beside which all others would look alike.
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    dots = axes.scatter(
        [math.log10(row["frequency"]) for row in rows],
        [math.log10(row["strength"]) for row in rows],
        c=[row[name] for row in rows],
        s=7,
        cmap="viridis",
        vmin=low if least is None else min(low, least),
        vmax=high if least is None else 1.0,
    )
    bar = figure.colorbar(dots, ax=axes, extend="both" if least is None else "min")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set(xlabel="log10 frequency", ylabel="log10 mean activation (raw units)")


def draw_theory(rows: Sequence[Row], path: Path) -> Path:
    """Learnt strength of toy features against their own, and the difference."""
    coefficients = sorted(distinct(rows, "l1_coefficient"))
    figure, axes = panels(2, width=5.0, height=3.8)
    for place, coefficient in enumerate(coefficients):
        own = select(rows, l1_coefficient=coefficient)
        style: dict[str, Any] = {
            "color": COLORS[place % len(COLORS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "none",
            "markersize": 4.5,
            "label": f"coefficient {coefficient:g}",
        }
        strengths = [row["strength"] for row in own]
        axes[0].plot(strengths, [row["learnt"] for row in own], **style)
        lines = sorted(
            {(row["strength"], row["predicted"]) for row in own}
            | {(0.0, 0.0), (coefficient / 2, 0.0)}
        )
        axes[0].plot(*zip(*lines, strict=True), color=style["color"], linewidth=1.0)
        living = [row for row in own if row["predicted"] > 0]
        axes[1].plot(
            [row["frequency"] for row in living],
            [row["strength"] - row["learnt"] for row in living],
            **style,
        )
        axes[1].axhline(coefficient / 2, color=style["color"], linewidth=1.0)
    axes[0].set(xlabel="strength of the feature", ylabel="strength of its reconstruction")
    axes[1].set_xscale("log")
    frequencies = sorted(distinct(rows, "frequency"))
    axes[1].set_xticks(frequencies, [f"{frequency:.2g}" for frequency in frequencies])
    axes[1].minorticks_off()
    axes[1].set_ylim(bottom=0)
    axes[1].set(xlabel="frequency of the feature", ylabel="shrinkage of alive features")
    return save(figure, path)
