"""Pictures of the study of rare latents."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from lightning_sae.studies.rare_latents.settings import BASE, ORIGINS
from lightning_sae.studies.shared.plots import COLORS, MARKERS, Point, curves, panels, save
from lightning_sae.studies.shared.rows import Row, distinct, known, select, spread

SHOWN = {
    "seed": "another seed",
    "with_initial": "initial\ndecoder rows",
    "with_input": "minus mean\ninput",
    "with_normal": "normal,\ninput",
    "with_data_normal": "normal,\nactivations",
}


def draw_shares(rows: Sequence[Row], path: Path) -> Path:
    """Share of rare latents against width, and over the long runs."""
    figure, (left, right) = panels(2, width=4.8)
    means: dict[str, list[Point]] = {}
    bars: dict[str, list[Point]] = {}
    for hook in distinct(rows, "hook"):
        own = select(rows, hook=hook, origin=BASE, penalty="L1", length=1.0)
        own = select(own, coefficient=own[0]["coefficient"])
        widths = sorted(distinct(own, "width"))
        shares = [known(select(own, width=width), "rare") for width in widths]
        name = hook.replace("hook_", "")
        means[name] = [(w, mean(each)) for w, each in zip(widths, shares, strict=True)]
        bars[name] = [(0.0, spread(each)) for each in shares]
    labels = {"x": "latents per dimension of the activations", "y": "share of rare latents"}
    curves(left, means, spread=bars, logarithmic=True, **labels)
    left.set_ylim(bottom=0)
    kinds = [(origin, False) for origin in ORIGINS] + [(BASE, True)]
    for place, hook in enumerate(distinct(rows, "hook")):
        for style, (origin, slow) in zip(("-", "--", ":", "-."), kinds, strict=True):
            found = select(rows, hook=hook, origin=origin, slow=slow)
            own = [row for row in found if row.get("rare_over_time")]
            if own:
                line = np.mean([row["rare_over_time"] for row in own], axis=0)
                name = f"{hook.replace('hook_', '')}, {ORIGINS[origin]}"
                name += ", slow warm-up" if slow else ""
                right.plot(own[0]["steps"], line, style, color=COLORS[place], label=name)
    right.set(xlabel="step of a long run", ylabel="share of rare latents")
    right.set_ylim(bottom=0)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=7, loc="upper right")
        right.set_ylim(top=1.7 * right.get_ylim()[1])
    left.legend(frameon=False, fontsize=8)
    return save(figure, path)


def draw_directions(rows: Sequence[Row], between: Sequence[Row], path: Path) -> Path:
    """Cosines of the common direction, by origin."""
    figure, found = panels(len(ORIGINS), width=4.2, height=3.4)
    hooks = distinct(rows, "hook")
    for axes, (origin, words) in zip(found, ORIGINS.items(), strict=True):
        for place, hook in enumerate(hooks):
            own = select(rows, origin=origin, hook=hook)
            for at, figure_name in enumerate(SHOWN):
                source = select(between, origin=origin, hook=hook)
                values = (
                    known(source, "cosine") if figure_name == "seed" else known(own, figure_name)
                )
                aside = (place - (len(hooks) - 1) / 2) * 0.25
                axes.plot(
                    [at + aside] * len(values),
                    values,
                    MARKERS[place],
                    color=COLORS[place],
                    markersize=4,
                    alpha=0.7,
                    linestyle="",
                    label=hook.replace("hook_", "") if at == 0 else None,
                )
        axes.axhline(0, color="#5b6673", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(SHOWN)), list(SHOWN.values()), fontsize=7)
        axes.set(ylim=(-0.5, 1.02))
        axes.set_title(words, fontsize=9)
    found[0].set_ylabel("cosine with the rare latents' common direction")
    return save(figure, path)
