"""What the study of penalties says and draws."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_sae.studies.shared.page import Page, Section, Table
from lightning_sae.studies.shared.plots import curves, panels, save
from lightning_sae.studies.shared.sweep import Answers, Swept, over_seeds

BIAS = "relative_reconstruction_bias"

FIGURES = {
    "l0": ("L0", ".1f"),
    "ce_spliced": ("CE", ".3f"),
    "mse": ("MSE", ".2f"),
    "fvu": ("FVU", ".3f"),
    "loss_recovered_zero": ("loss recovered, zero", ".4f"),
    "loss_recovered_mean": ("loss recovered, mean", ".4f"),
    BIAS: ("gamma", ".3f"),
    "dead_fraction": ("dead", ".3f"),
}
"""Headings and formats of the table of all SAEs."""


def draw(swept: Swept, path: Path) -> Path:
    """Cross-entropy, squared error and shrinkage against L0, with their spread."""
    figure, axes = panels(3)
    words = {
        "ce_spliced": "cross-entropy with the reconstruction (nats)",
        "mse": "MSE (raw units, summed over d_in)",
        BIAS: "relative reconstruction bias gamma",
    }
    for panel, (name, y) in zip(axes, words.items(), strict=True):
        means, spreads = swept.points(name)
        curves(panel, means, x="L0 (active latents)", y=y, spread=spreads, logarithmic=True)
    clean = mean(row["ce_clean"] for row in swept.rows)
    for panel, value in ((axes[0], clean), (axes[2], 1.0)):
        panel.axhline(value, color="#5b6673", linewidth=0.8, linestyle=":")
    return save(figure, path)


def report(
    swept: Swept, answers: Mapping[str, Answers], picture: Path, settings: Mapping[str, Any]
) -> Page:
    """The study's page."""
    caption = (
        f"Means over {swept.seeds} seeds against L0; bars are standard deviations of both. Dotted: "
        "the model left alone, and no shrinkage."
    )
    labels = swept.labels
    text = [in_words(labels[name], own) for name, own in answers.items()]
    tables = [
        _against(labels, answers, "ce_spliced", "CE (nats)", ".4f"),
        _against(labels, answers, "mse", "MSE", ".3f"),
    ]
    return Page(
        "Sparsity penalties",
        "Is the square root as a penalty below and left of L1, and are others?",
        METHOD,
        settings,
        [
            Section("Against L1", text, tables, {picture: caption}),
            swept.section("All SAEs", FIGURES),
            swept.tuned.section(labels),
        ],
        comparison(answers),
        "Riggs Smith, Improving SAE's by Sqrt()-ing L1 & Removing Lowest Activating Features "
        "(2024); for the logarithm the discussion of Rajamanoharan et al., Improving Dictionary "
        "Learning with Gated Sparse Autoencoders (2024)",
    )


METHOD = (
    "ReLU SAEs with unit decoder rows; penalties are of activations scaled to mean norm √d. Each "
    "penalty is swept over its weight. All SAEs of a seed see the same batches, from one pass of "
    "the language model; all figures are of held-out text. Learning rates are each penalty's own, "
    "chosen on a seed of its own by the objective on held-out text.",
    "Curves are straight between measured points over log L0 and compared where both a penalty and "
    "L1 have been measured; nothing is extrapolated.",
)


def _against(
    labels: Mapping[str, str], answers: Mapping[str, Answers], cost: str, words: str, form: str
) -> Table:
    rows = [
        [
            labels[name],
            over_seeds(own[f"area_{cost}"], form),
            over_seeds(own[f"gap_{cost}"], form),
            over_seeds(own[f"below_{cost}"]),
            over_seeds(own[f"l0_ratio_{cost}"]),
        ]
        for name, own in answers.items()
    ]
    headings = [
        words,
        "area less L1's",
        "mean distance",
        "share of L0 below L1",
        "L0 at equal cost, L1 = 1",
    ]
    note = "The area is the mean distance times the e-folds of L0 that the penalty and L1 share."
    return Table(headings, rows, note)


def in_words(label: str, answers: Answers) -> str:
    """Whether a penalty lies below and left of L1, as its numbers have it."""
    verdicts = [
        f"its {words} is {below(answers[f'below_{cost}'])}, {left(answers[f'l0_ratio_{cost}'])}"
        for cost, words in (("ce_spliced", "CE"), ("mse", "MSE"))
    ]
    return f"{label}: {'; '.join(verdicts)}."


def below(shares: list[float | None]) -> str:
    """How much of one curve is below another."""
    known = [share for share in shares if share is not None]
    if not known:
        return "at no L0 that both have"
    if min(known) == 1:
        return "below that of L1 throughout the common range of L0"
    if max(known) == 0:
        return "below that of L1 nowhere in the common range of L0"
    return f"below that of L1 in {mean(known):.0%} of the common range of log L0"


def left(ratios: list[float | None]) -> str:
    """Which of two curves needs fewer latents."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "and no level is reached by both"
    needs = f"and for an equal one it needs {mean(known):.2f} of the L0"
    if max(known) < 1 or min(known) > 1:
        return f"{needs}, {'less' if max(known) < 1 else 'more'} in every repetition"
    return f"{needs}, less or more by repetition"


def comparison(answers: Mapping[str, Answers]) -> list[tuple[str, str, str]]:
    """Rows of the documents' statements and what is seen here."""
    rows = []
    if "sqrt" in answers:
        own = answers["sqrt"]
        for cost, words in (("ce_spliced", "CE"), ("mse", "MSE")):
            seen = f"{below(own[f'below_{cost}'])}, {left(own[f'l0_ratio_{cost}'])}"
            rows.append((f"{words} against L0 of sqrt", "below and left of L1", seen))
    if "log" in answers:
        own = answers["log"]
        seen = f"gamma less that of L1: {over_seeds(own['gap_gamma'], '+.3f')}"
        rows.append(("Shrinkage with log", "less than with L1", seen))
        seen = f"CE less that of L1: {over_seeds(own['gap_low_ce_spliced'], '+.4f')} nats"
        rows.append(("Loss at low L0 with log", "a decent boost to loss recovered", seen))
    return rows
