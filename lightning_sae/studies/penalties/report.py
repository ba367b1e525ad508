"""Tables, picture and page of the study of penalties."""

from collections.abc import Mapping
from statistics import mean

from lightning_sae.studies.shared.page import Compared, Page, Section, Table
from lightning_sae.studies.shared.sweep import (
    BIAS,
    METHOD,
    Answers,
    Swept,
    in_every_repetition,
    over_seeds,
)

FIGURES = {
    "l0": ("L0", ".1f"),
    "ce_spliced": ("CE", ".3f"),
    "ce_clean": ("CE, clean", ".3f"),
    "mse": ("MSE", ".2f"),
    "fvu": ("FVU", ".3f"),
    "loss_recovered_zero": ("loss recovered, zero", ".4f"),
    "loss_recovered_mean": ("loss recovered, mean", ".4f"),
    BIAS: ("gamma", ".3f"),
    "dead_fraction": ("dead", ".3f"),
}
"""Headings and formats of the table of all SAEs."""


DRAWN = {
    "ce_spliced": "cross-entropy with the reconstruction (nats)",
    "mse": "MSE (raw units, summed over d_in)",
    BIAS: "relative reconstruction bias gamma",
}
"""Figures plotted against L0."""


def report(swept: Swept, answers: Mapping[str, Answers]) -> Page:
    """The study's page."""
    clean = mean(row["ce_clean"] for row in swept.rows)
    dotted = {"ce_spliced": clean, BIAS: 1.0}
    picture = swept.draw(swept.folder / "penalties.png", DRAWN, dotted)
    caption = (
        f"Means over {swept.seeds} seeds against L0; bars are standard deviations of both. "
        "Numbers in the first panel: the penalty's weight. Dotted: the model without an SAE, and "
        "no shrinkage."
    )
    labels = swept.labels
    text = [in_words(labels[name], own) for name, own in answers.items()]
    tables = [
        _against(labels, answers, "ce_spliced", "CE (nats)", ".4f", swept.clean()),
        _against(labels, answers, "mse", "MSE", ".3f"),
    ]
    return Page(
        "Sparsity penalties",
        "Is the curve of the square root below and left of that of L1, and are others?",
        (RELU, METHOD, CURVES),
        swept.settings,
        [
            Section("Against L1", text, tables, {picture: caption}),
            swept.section(FIGURES),
            swept.tuned.section(labels),
        ],
        comparison(answers),
        "Riggs Smith, Improving SAE's by Sqrt()-ing L1 & Removing Lowest Activating Features "
        "(2024); for the logarithm the discussion of Rajamanoharan et al., Improving Dictionary "
        "Learning with Gated Sparse Autoencoders (2024)",
        caution=swept.caution(),
    )


RELU = (
    "A family is ReLU SAEs with one penalty and unit decoder rows; penalties are of activations "
    "scaled to mean norm √d."
)
CURVES = (
    "Curves are straight between measured points over log L0 and compared where both a penalty and "
    "L1 have been measured; nothing is extrapolated."
)


def _against(
    labels: Mapping[str, str],
    answers: Mapping[str, Answers],
    cost: str,
    words: str,
    form: str,
    clean: str = "",
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
    return Table(headings, rows, f"{note} {clean}".rstrip())


def in_words(label: str, answers: Answers) -> str:
    """Whether a penalty's curves lie below and left of those of L1."""
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
    return (
        f"and for an equal one it needs {mean(known):.2f} of the L0, {in_every_repetition(known)}"
    )


def comparison(answers: Mapping[str, Answers]) -> list[Compared]:
    """The documents' statements beside the answers."""
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
