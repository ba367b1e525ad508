"""Tables, picture and page of the study of gating."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from lightning_sae.studies.shared.frontier import Curve, common_levels
from lightning_sae.studies.shared.page import Compared, Page, Section, Table, figures_table
from lightning_sae.studies.shared.rows import Row, select, with_spread
from lightning_sae.studies.shared.sweep import (
    BIAS,
    METHOD,
    Answers,
    Swept,
    in_every_repetition,
    over_seeds,
)

LEVEL = "loss_recovered_mean"
"""The figure held equal. Zero and mean ablation differ only in scale, so L0 is the same."""

FIGURES = {
    "l0": ("L0", ".1f"),
    "loss_recovered_zero": ("loss recovered, zero", ".4f"),
    "loss_recovered_mean": ("loss recovered, mean", ".4f"),
    "ce_spliced": ("CE", ".3f"),
    "ce_clean": ("CE, clean", ".3f"),
    "fvu": ("FVU", ".3f"),
    BIAS: ("gamma", ".3f"),
    "l2_ratio": ("L2 ratio", ".3f"),
    "dead_fraction": ("dead", ".3f"),
}
"""Headings and formats of the table of all SAEs."""

DRAWN = {
    "loss_recovered_zero": "loss recovered (zero ablation)",
    "loss_recovered_mean": "loss recovered (mean ablation)",
    "fvu": "fraction of variance unexplained",
    BIAS: "relative reconstruction bias gamma",
    "l2_ratio": "L2 ratio",
    "dead_fraction": "share of dead latents",
}
"""Figures plotted against L0."""


def equal_loss(swept: Swept, n_levels: int = 5) -> Table | None:
    """L0 of each family at levels of loss recovered that the baseline and some family reach."""
    found = [
        [swept.curve(family, seed, LEVEL) for seed in range(swept.seeds)]
        for family in swept.families
    ]
    first = [curve for curve in found[0] if curve is not None]
    others = [curve for of in found[1:] for curve in of if curve is not None]
    spans = [common_levels([*first, other]) for other in others] if first else []
    known = [span for span in spans if span is not None]
    if not known:
        return None
    low, high = min(span[0] for span in known), max(span[1] for span in known)
    rows = []
    for i in range(n_levels):
        level = low + (high - low) * i / (n_levels - 1)
        rows.append([f"{level:.3f}", *(_l0_at(of, level) for of in found)])
    headings = ["loss recovered, mean", *swept.labels.values()]
    note = "L0, straight over log L0; none where some repetition does not reach it."
    return Table(headings, rows, f"{note} {swept.clean()}".rstrip())


def _l0_at(of_seeds: Sequence[Curve | None], level: float) -> str:
    logs = [None if curve is None else curve.log_l0_at(level) for curve in of_seeds]
    known = [math.exp(log) for log in logs if log is not None]
    return with_spread(known, ".1f") if len(known) == len(logs) else "none"


def report(swept: Swept, answers: Mapping[str, Answers], as_gated: Sequence[Row] = ()) -> Page:
    """The study's page.

    Args:
        swept: All SAEs.
        answers: Comparisons with the baseline, by family.
        as_gated: Figures of rescaled and shifted SAEs as gated ones.
    """
    levels = equal_loss(swept)
    tables = [_against(swept, answers), *([] if levels is None else [levels])]
    text = [in_words(family.label, answers[family.name]) for family in swept.families[1:]]
    picture = swept.draw(swept.folder / "gated.png", DRAWN, dotted={BIAS: 1.0, "l2_ratio": 1.0})
    caption = (
        f"Means over {swept.seeds} seeds against L0; bars are standard deviations of both. "
        "Numbers in the first panel: the penalty's weight. Dotted: no shrinkage."
    )
    return Page(
        "Gated SAEs",
        "Do gated SAEs reconstruct as well with fewer latents, and do they shrink activations "
        "less?",
        (METHOD, EQUAL_LOSS),
        swept.settings,
        [
            Section("At equal loss recovered", text, tables, {picture: caption}),
            swept.section(FIGURES),
            *([_the_same(swept, as_gated)] if as_gated else []),
            swept.tuned.section(swept.labels),
        ],
        comparison(answers),
        "Rajamanoharan et al., Improving Dictionary Learning with Gated Sparse Autoencoders "
        "(2024), and its discussion",
        caution=swept.caution(),
    )


def _the_same(swept: Swept, rows: Sequence[Row]) -> Section:
    """Rescaled and shifted SAEs as gated ones."""
    groups = {
        f"{swept.labels[name]}, {c:g}": select(rows, family=name, coefficient=c)
        for name, c in dict.fromkeys((row["family"], row["coefficient"]) for row in rows)
    }
    columns = {
        "l0": ("L0", ".1f"),
        "negative": ("negative firings", ".5f"),
        "fvu": ("FVU", ".4f"),
        "fvu_as_gated": ("FVU as gated", ".4f"),
    }
    note = "With b_mag + exp(r) b_enc as the gated SAE's b_mag, which has a ReLU in addition."
    worst = max(abs(row["fvu_as_gated"] - row["fvu"]) for row in rows)
    text = (
        "A rescaled and shifted ReLU is a gated SAE with other parameters, but for the ReLU of its "
        f"magnitudes. Written as one, the FVU of {len(rows)} trained SAEs changes by at most "
        f"{worst:.5f}; {mean(row['negative'] for row in rows):.4%} of firings are negative."
    )
    return Section("The same function", [text], [figures_table(groups, columns, note)])


EQUAL_LOSS = (
    "At equal loss recovered, L0 is read off each family's curve, straight between measured points "
    "over log L0, and the ratio to the baseline is the geometric mean over all levels that both "
    "reach; nothing is extrapolated. Loss recovered against zero and against mean ablation are "
    "linear in the cross-entropy, so the ratio is the same for both. gamma is E‖x̂‖² / E[x·x̂], 1 "
    "without shrinkage: a mean over the log L0 that a family and the baseline both have."
)


def _against(swept: Swept, answers: Mapping[str, Answers]) -> Table:
    rows = [
        [
            family.label,
            over_seeds(answers[family.name]["l0_ratio"]),
            over_seeds(answers[family.name]["gamma"], ".3f"),
            over_seeds(answers[family.name]["gamma_of_baseline"], ".3f"),
        ]
        for family in swept.families
    ]
    headings = ["", "L0 at equal loss, baseline = 1", "gamma", "gamma of baseline there"]
    return Table(headings, rows, swept.clean())


def in_words(label: str, answers: Answers) -> str:
    """The answer for one family."""
    ratios = [ratio for ratio in answers["l0_ratio"] if ratio is not None]
    if not ratios:
        return f"{label}: no loss recovered that both it and the baseline reach."
    return (
        f"{label} needs {mean(ratios):.2f} of the baseline's L0 for the same loss recovered: "
        f"{in_every_repetition(ratios)}."
    )


def comparison(answers: Mapping[str, Answers]) -> list[Compared]:
    """The document's statements beside the answers."""

    def seen(name: str, what: str, form: str = ".2f") -> str:
        return over_seeds(answers[name][what], form) if name in answers else "not trained"

    return [
        (
            "L0 of gated over that of the baseline, at equal loss recovered",
            "about one half",
            seen("gated", "l0_ratio"),
        ),
        ("gamma of gated", "about 1", seen("gated", "gamma", ".3f")),
        ("gamma of the baseline", "clearly below 1", seen("gated", "gamma_of_baseline", ".3f")),
        (
            "gamma of frozen ReLU, rescaled and shifted",
            "about 1: enough against shrinkage",
            seen("frozen-rescale-shift", "gamma", ".3f"),
        ),
        (
            "L0 of frozen ReLU, rescaled and shifted, over that of the baseline",
            "a small part of what gating gives",
            seen("frozen-rescale-shift", "l0_ratio"),
        ),
        (
            "L0 of rescaled and shifted ReLU, all of it trained, over that of the baseline",
            "not in the paper",
            seen("rescale-shift", "l0_ratio"),
        ),
        (
            "L0 of gated with norms in the penalty over that of the baseline",
            "slightly more than gated",
            seen("gated-norms", "l0_ratio"),
        ),
    ]
