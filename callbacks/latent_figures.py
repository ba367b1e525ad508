"""Plots of all latents during training."""

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.architectures.orthogonality import WithOrthogonality
from lightning_sae.callbacks.histograms import latent_statistics
from lightning_sae.callbacks.loggers import histogram, hold_figures, log_figure

DECADES = (-7, 0)  # range of log10 frequencies that are resolved
PER_DECADE = 5
N_SHOWN = 6  # number of latents with a histogram
N_ROWS = 4096  # held-out activations in each histogram


class LatentFigures(Callback):
    """Plots of the latents after each validation, for loggers that accept images.

    - `latents/frequency_over_training`: how many latents fired how often on the held-out
      activations of each validation so far;
    - `latents/frequency_against_projection`: each latent's frequency, and the dot product of its
      encoder and decoder rows (the D/E projection);
    - `latents/activations_and_thresholds`, with the auxiliary loss of orthogonality: histograms of
      how strongly the most frequent latents fire, with the threshold in force.

    With loggers that accept no images, nothing is drawn.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.counts: list[list[int]] = []
        self._rows: Tensor | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a resume loads its state after this."""
        self.steps, self.counts = [], []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Float[Tensor, "batch d_in"],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._rows = batch[:N_ROWS]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, self._rows = self._rows, None
        if trainer.sanity_checking or rows is None or not isinstance(pl_module, SparseAutoencoder):
            return
        shown = trainer.is_global_zero and hold_figures(trainer.loggers)
        if not shown and pl_module.parts.n == 1:
            return
        points = frequency_and_projection(pl_module)  # which parts of a dictionary exchange
        if not shown:
            return
        self._count(trainer.global_step, pl_module)
        for name, figure in self._draw(pl_module, rows, points).items():
            log_figure(trainer.loggers, f"latents/{name}", figure, trainer.global_step)

    def _count(self, step: int, sae: SparseAutoencoder) -> None:
        frequency = sae.held_out_frequency
        assert frequency is not None
        place = ((frequency.log10() - DECADES[0]) * PER_DECADE).floor()
        n = (DECADES[1] - DECADES[0]) * PER_DECADE
        # The first row is of latents that never fired.
        place = torch.where(frequency > 0, place.clamp(0, n - 1) + 1, 0).long()
        self.steps.append(step)
        self.counts.append(torch.bincount(place.cpu(), minlength=n + 1).tolist())

    def _draw(
        self, sae: SparseAutoencoder, rows: Tensor, points: tuple[Tensor, Tensor]
    ) -> dict[str, Figure]:
        found = {
            "frequency_over_training": frequency_over_training(self.steps, self.counts),
            "frequency_against_projection": frequency_against_projection(*points),
        }
        if isinstance(sae, WithOrthogonality) and sae.peaks is not None:
            found["activations_and_thresholds"] = activations_and_thresholds(sae, rows)
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counts of earlier validations."""
        return {"steps": list(self.steps), "counts": [list(each) for each in self.counts]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.steps, self.counts = list(state_dict["steps"]), list(state_dict["counts"])


def frequency_over_training(steps: list[int], counts: list[list[int]]) -> Figure:
    """A column for each validation, shaded by the number of latents of each frequency.

    Args:
        steps: Optimizer steps before each validation.
        counts: Number of latents by frequency: first those that never fired, then `PER_DECADE` bins
            per decade.
    """
    figure, axes = _axes("validation at step", "frequency on held-out activations")
    columns = torch.tensor(counts).T
    n_bins = len(columns)
    shaded = columns.double().where(columns > 0, torch.nan)
    image = axes.imshow(
        shaded.numpy(),
        origin="lower",
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(1, max(2, int(columns.max()))),
        extent=(-0.5, len(steps) - 0.5, -1.5, n_bins - 1.5),
        interpolation="nearest",
    )
    shown = range(0, len(steps), max(1, len(steps) // 6))
    axes.set_xticks(list(shown), [f"{steps[i]:,}" for i in shown])
    decades = range(DECADES[0] + 1, DECADES[1] + 1)
    places = [(decade - DECADES[0]) * PER_DECADE - 0.5 for decade in decades]
    axes.set_yticks([-1.0, *places], ["never", *(f"1e{decade}" for decade in decades)])
    figure.colorbar(image, ax=axes, label="latents")
    return figure


@torch.no_grad()
def frequency_and_projection(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """The log10 of each latent's frequency, and the product of its encoder and decoder rows.

    Of a split dictionary those of all parts; each part has to call this.
    """
    projection = sae.parts.joined((sae.W_enc.T * sae.W_dec).sum(-1))
    return latent_statistics(sae)["log10_frequency"], projection.float().cpu()


def frequency_against_projection(
    frequency: Float[Tensor, " d_sae"], projection: Float[Tensor, " d_sae"]
) -> Figure:
    """A point for each latent, at the log10 of its frequency and its projection."""
    figure, axes = _axes(
        "log10 of the frequency on held-out activations", "encoder row · decoder row"
    )
    axes.plot(frequency.numpy(), projection.numpy(), ".", markersize=3, alpha=0.6)
    axes.axhline(0, color="gray", linewidth=0.6)
    return figure


@torch.no_grad()
def activations_and_thresholds(sae: WithOrthogonality, rows: Float[Tensor, "rows d_in"]) -> Figure:
    """Histograms of the activations of the latents that fire most on some rows."""
    assert sae.peaks is not None
    f = sae.encode(rows[: max(1, 2**23 // sae.d_sae)])
    thresholds = sae.orthogonality_scale * sae.peaks.thresholds() / sae.input_scale
    shown = (f > 0).sum(0).topk(min(N_SHOWN, sae.d_sae)).indices.sort().values.tolist()
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.12, top=0.94, hspace=0.35, wspace=0.25)
    for axes, latent in zip(figure.subplots(2, 3).flat, shown, strict=False):
        axes.stairs(*histogram(f[:, latent][f[:, latent] > 0], bins=40), fill=True)
        axes.axvline(float(thresholds[latent]), color="tab:red", linewidth=1)
        axes.set_title(f"latent {latent}", fontsize=8)
        axes.set_yscale("symlog", linthresh=1)
        axes.tick_params(labelsize=7)
    figure.supxlabel("activation where it fires; the line is the threshold", fontsize=9)
    figure.supylabel("held-out activations", fontsize=9)
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    # Fixed margins, because an automatic layout would draw twice.
    figure = Figure(figsize=(5.4, 4))
    figure.subplots_adjust(left=0.14, right=0.96, bottom=0.13, top=0.96)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
