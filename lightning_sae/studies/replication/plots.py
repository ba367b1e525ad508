"""Plots of the study of replication."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor

from lightning_sae.studies.replication.settings import (
    CONSTRAINED,
    FINAL_WINDOWS,
    LABELS,
    PLAIN,
    RARE,
    RAREST,
    WORDS,
    Results,
    members,
)
from lightning_sae.studies.shared.plots import COLORS, curves, panels, save
from lightning_sae.studies.shared.rows import spread
from lightning_sae.studies.shared.snapshots import Snapshots

N_BINS = 40


def draw_over_time(results: Results, path: Path) -> Path:
    """For each SAE of the first seed, how many latents have which frequency, over training."""
    snapshots: Mapping[str, Snapshots] = results[0]["snapshots"]
    shown = [name for name in LABELS if name in snapshots]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, found = panels(columns, rows, width=4.4, height=3.3)
    for axes in found[len(shown) :]:
        axes.remove()
    for axes, name in zip(found, shown, strict=False):
        mesh = _heat_map(axes, snapshots[name])
        axes.set_title(LABELS[name], fontsize=9)
    figure.colorbar(mesh, ax=found[: len(shown)], label="latents", shrink=0.8)
    return save(figure, path)


def _heat_map(axes: Axes, snapshots: Snapshots) -> Any:
    n_windows, d_sae = snapshots.counts.shape
    edges = _edges(float(snapshots.n.max()) * FINAL_WINDOWS)
    counts = [
        _histogram(snapshots.frequency(end, FINAL_WINDOWS), edges) for end in range(n_windows)
    ]
    times = np.array([0, *snapshots.steps.tolist()])
    heights = np.ma.masked_less(np.array(counts).T, 1)
    mesh = axes.pcolormesh(times, edges, heights, norm=LogNorm(1, d_sae), cmap="viridis")
    axes.grid(visible=False)
    for level in _visible(edges):
        axes.axhline(level, color="#b8433d", linewidth=0.9, linestyle="--")
    _name_frequencies(axes, edges)
    axes.set(xlabel="step of training", ylabel="share of activations")
    return mesh


def _edges(n_activations: float) -> Any:
    """Bins of log10 frequency; the lowest is for latents that never fired."""
    least = np.log10(0.7 / n_activations)
    bins = np.linspace(least, 0, N_BINS)
    return np.concatenate([[least - 2 * (bins[1] - bins[0])], bins])


def _visible(edges: Any) -> list[float]:
    """The levels that can be told from zero with so many activations."""
    return [np.log10(level) for level in (RARE, RAREST) if np.log10(level) > edges[1]]


def _histogram(frequency: Tensor, edges: Any) -> Any:
    never = (edges[0] + edges[1]) / 2
    values = torch.where(frequency > 0, frequency.clamp_min(1e-30).log10(), never)
    return np.histogram(values.numpy(), edges)[0]


def _name_frequencies(axes: Axes, edges: Any, along: str = "y") -> None:
    powers = [power for power in range(-9, 1) if power > edges[1]]
    ticks = [(edges[0] + edges[1]) / 2, *powers]
    words = ["never", *(f"$10^{{{power}}}$" for power in powers)]
    (axes.set_yticks if along == "y" else axes.set_xticks)(ticks, words)


def draw_shares(results: Results, path: Path) -> Path:
    """Shares of rare latents over training, means over seeds."""
    figure, found = panels(2, width=4.6)
    for axes, level in zip(found, (RARE, RAREST), strict=True):
        present = members(results)
        lines = {
            label: _shares(results, name, level) if name in present else []
            for name, label in LABELS.items()
        }
        curves(
            axes,
            {label: [(x, y) for x, y, _ in line] for label, line in lines.items()},
            spread={label: [(0.0, s) for *_, s in line] for label, line in lines.items()},
            x="step of training",
            y=f"share of latents below {WORDS[level]}",
        )
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 0.01))
    return save(figure, path)


def _shares(results: Results, name: str, level: float) -> list[tuple[float, float, float]]:
    """Steps, means and standard deviations of the share of latents below a frequency."""
    of_seeds = [each["snapshots"][name] for each in results if name in each["snapshots"]]
    line = []
    for end, step in enumerate(of_seeds[0].steps.tolist()):
        shares = [
            float((s.frequency(end, FINAL_WINDOWS) < level).double().mean()) for s in of_seeds
        ]
        line.append((float(step), mean(shares), spread(shares)))
    return line


def draw_frequencies(results: Results, path: Path) -> Path:
    """Histograms of the frequencies at the end of training, all seeds together."""
    figure, (axes,) = panels(1, width=7.0, height=4.0)
    edges = _edges(max(_counted(each) for each in results))
    for name in members(results):
        of_seeds = [each["snapshots"][name] for each in results if name in each["snapshots"]]
        counts = sum(_histogram(s.frequency(-1, FINAL_WINDOWS), edges) for s in of_seeds)
        color = COLORS[list(LABELS).index(name)]
        axes.stairs(counts / len(of_seeds), edges, color=color, linewidth=1.4, label=LABELS[name])
    _name_frequencies(axes, edges, "x")
    axes.set(xlabel="share of activations on which a latent fires", ylabel="latents")
    axes.set_yscale("symlog", linthresh=10)
    for level in _visible(edges):
        axes.axvline(level, color="#6f7c85", linewidth=0.9, linestyle="--")
    return save(figure, path)


def _counted(result: Mapping[str, Any]) -> float:
    return max(float(s.n[-FINAL_WINDOWS:].sum()) for s in result["snapshots"].values())


def draw_cosines(results: Results, path: Path) -> Path:
    """Cosines with the rare latents' direction; cosines of encoder and decoder."""
    shown = [name for name in (PLAIN, CONSTRAINED) if name in members(results)]
    figure, found = panels(len(shown) + 1, width=4.2, height=3.6)
    for axes, name in zip(found, shown, strict=False):
        latents = [each["per_latent"][name] for each in results if name in each["per_latent"]]
        _two_histograms(axes, latents, "with_rare_direction")
        axes.set_xlabel("cosine of encoder row with the rare mean")
        axes.set_title(LABELS[name], fontsize=9)
    latents = [each["per_latent"][PLAIN] for each in results]
    _two_histograms(found[-1], latents, "encoder_decoder_cosine")
    found[-1].set_xlabel("cosine of encoder and decoder rows")
    found[-1].set_title(LABELS[PLAIN], fontsize=9)
    found[0].set_ylabel("share of the group")
    return save(figure, path)


def _two_histograms(axes: Axes, latents: Sequence[Mapping[str, Any]], figure: str) -> None:
    rare = np.concatenate([np.array(each["rare"], dtype=bool) for each in latents])
    values = np.concatenate([np.array(each[figure]) for each in latents])
    edges = np.linspace(-1, 1, 61)
    for which, label, color in (
        (rare, f"rare (below {WORDS[RARE]})", COLORS[3]),
        (~rare, "others", COLORS[0]),
    ):
        if which.any():
            weights = np.full(which.sum(), 1 / which.sum())
            heights = np.histogram(values[which], edges, weights=weights)[0]
            axes.stairs(heights, edges, color=color, fill=True, alpha=0.5, label=label)
