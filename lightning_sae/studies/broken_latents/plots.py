"""Plots of one SAE on toy data: cosines, activations, firings."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_sae.data.toy.datamodule import ToySample
from lightning_sae.studies.broken_latents.measure import FAINT, Measured
from lightning_sae.studies.shared.peaks import BINS
from lightning_sae.studies.shared.plots import COLORS

PART = 0.15  # |cosine| from which a feature counts as part of a latent
PATTERNS = 14  # rows of the plot of firings
OTHERS = "#c9cdd2"


def cosines(measured: Measured, tied: bool) -> Figure:
    """Heat maps of the cosines of latents with features; one map where encoder is decoder."""
    maps = {} if tied else {"encoder": measured.encoder}
    maps["decoder"] = measured.decoder
    d_sae, n_features = measured.decoder.shape
    height = 0.36 * d_sae + 0.9
    figure = Figure(figsize=(0.42 * n_features + 1.6, height * len(maps)), layout="constrained")
    for place, (name, values) in enumerate(maps.items(), start=1):
        axes = figure.add_subplot(len(maps), 1, place)
        _heat_map(axes, values)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("feature", fontsize=8)
        axes.set_ylabel("latent", fontsize=8)
    return figure


def _heat_map(axes: Axes, values: Float[Tensor, "rows columns"]) -> None:
    axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.tick_params(labelsize=7, length=0)
    for row, column in (values.abs() >= 0.05).nonzero().tolist():
        value = values[row, column].item()
        color = "white" if abs(value) > 0.6 else "black"
        text = f"{value:.2f}".replace("0.", ".")
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)


def activations(measured: Measured, sample: ToySample, f: Float[Tensor, "n d_sae"]) -> Figure:
    """Histograms of each latent's activations, by which of the latent's features fire."""
    d_sae = f.shape[1]
    columns = min(d_sae, 4)
    rows = -(-d_sae // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows), layout="constrained")
    fires = sample.magnitudes > 0
    for latent in range(d_sae):
        axes = figure.add_subplot(rows, columns, latent + 1)
        _one_histogram(axes, f[:, latent], _parts(measured.decoder[latent]), fires)
        peaks = int(measured.peaks[latent])
        state = f"{peaks} peak{'s' * (peaks != 1)}" if measured.alive[latent] else "dead"
        axes.set_title(f"latent {latent}: {state}", fontsize=8, loc="left")
    return figure


def _parts(cosines: Float[Tensor, " n_features"], at_most: int = 3) -> list[int]:
    """The features that a latent consists of, the largest first."""
    order = cosines.abs().argsort(descending=True).tolist()
    return [i for i in order if cosines[i].abs() >= PART][:at_most]


def _one_histogram(
    axes: Axes, f: Float[Tensor, " n"], parts: list[int], fires: Bool[Tensor, "n n_features"]
) -> None:
    shown = f > FAINT * f.max()
    if not shown.any():
        axes.set_axis_off()
        return
    groups = dict(_groups(parts, fires[shown]))
    edges = torch.linspace(0, f.max().item(), BINS + 1).tolist()
    colors = [*COLORS[: len(groups) - 1], OTHERS]
    heights = [f[shown][mask].numpy() for mask in groups.values()]
    axes.hist(heights, bins=edges, stacked=True, color=colors, label=list(groups))
    axes.set_yscale("log")
    axes.margins(y=0.35)  # room for the legend, above the bars
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, frameon=False, handlelength=1, loc="upper right")
    axes.set_xlabel("activation", fontsize=7)


def _groups(
    parts: list[int], fires: Bool[Tensor, "n n_features"]
) -> Iterator[tuple[str, Bool[Tensor, " n"]]]:
    """Samples by which of the latent's features fire; the last group is that of none."""
    keys = sum(
        (fires[:, feature].long() << place for place, feature in enumerate(parts)),
        torch.zeros(len(fires), dtype=torch.int64),
    )
    for key in range(1, 2 ** len(parts)):
        mask = keys == key
        if mask.any():
            names = [str(feature) for place, feature in enumerate(parts) if key >> place & 1]
            yield " and ".join(names) + (" alone" if len(parts) > 1 and not names[1:] else ""), mask
    yield "none of these" if parts else "all", keys == 0


def firings(measured: Measured, sample: ToySample, f: Float[Tensor, "n d_sae"]) -> Figure:
    """True magnitudes beside the activations of latents, sample by sample.

    Each row is one of the most frequent patterns of the features that any latent has.
    """
    living = measured.decoder[measured.alive]
    features = (living.abs() >= PART).any(0).nonzero().flatten().tolist()
    features = features or list(range(measured.decoder.shape[1]))
    rows = _frequent(sample.magnitudes[:, features] > 0)
    true, latents = sample.magnitudes[rows][:, features], f[rows]
    widths = [true.shape[1], latents.shape[1]]
    figure = Figure(figsize=(0.5 * sum(widths) + 1.6, 0.27 * len(rows) + 0.9), layout="constrained")
    top = max(true.max().item(), latents.max().item())
    for axes, values, ticks, title in zip(
        figure.subplots(1, 2, width_ratios=widths),
        (true, latents),
        (features, range(f.shape[1])),
        ("features: true magnitude", "latents: activation"),
        strict=True,
    ):
        axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=top, aspect="auto")
        axes.set_xticks(range(values.shape[1]), [str(tick) for tick in ticks])
        axes.set_yticks([])
        axes.tick_params(labelsize=7, length=0)
        axes.set_title(title, fontsize=8, loc="left")
        for row, column in (values > FAINT * top).nonzero().tolist():
            value = values[row, column].item()
            color = "white" if value > 0.6 * top else "black"
            axes.text(
                column, row, f"{value:.3g}", ha="center", va="center", fontsize=6.5, color=color
            )
    return figure


def _frequent(fires: Bool[Tensor, "n features"]) -> list[int]:
    """One sample of each of the most frequent patterns except that of no firing."""
    patterns, inverse, counts = fires.unique(dim=0, return_inverse=True, return_counts=True)
    counts[~patterns.any(1)] = 0
    order = counts.argsort(descending=True, stable=True)[:PATTERNS]
    return [int((inverse == place).nonzero()[0]) for place in order.tolist() if counts[place]]
