"""Tables and page of the study of suppression."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sae.studies.shared.page import Page, Section, Table, caution, figures_table
from lightning_sae.studies.shared.rows import Row, distinct, known, select, with_spread
from lightning_sae.studies.suppression.comparison import comparison, killed, of_method, theory_text
from lightning_sae.studies.suppression.measure import LEAST_GAP, RARE, associations
from lightning_sae.studies.suppression.plots import (
    draw_bars,
    draw_frequencies,
    draw_latents,
    draw_theory,
    short,
    words,
)
from lightning_sae.studies.suppression.train import ENCODER_IS_FROZEN, METHODS, ORIGINAL

Results = Sequence[Mapping[str, list[Row]]]

SOURCE = (
    "Wright and Sharkey, Addressing feature suppression in SAEs (2024): Pythia-70m, residual "
    "stream behind each of six layers, 2,048 latents"
)
QUESTION = (
    "An L1 penalty shrinks what a sparse autoencoder finds. How much, which latents most, and does "
    "fine-tuning without the penalty give it back?"
)
PICTURES = {
    "bars.png": "Each hook and method, on held-out text. Broken line: no shrinkage. Error bars: "
    "standard deviation over seeds.",
    "frequencies.png": "How often latents fire. Left of a dotted line, where there is a gap in the "
    "curve, they count as dead.",
    "latents.png": "Alive latents of seed 0. Above what the method decoder multiplies each by, in "
    "the middle what that adds to its mean activation, below how far its decoder row turns.",
    "theory.png": "Orthogonal binary features. Lines: theory. Points: the features of all seeds, "
    "at several frequencies.",
}


def report(folder: Path, settings: Row, results: Results) -> Page:
    """The study's page.

    Args:
        folder: The study's, for pictures.
        settings: The study's.
        results: Of each seed.
    """
    methods = [row for each in results for row in each["methods"]]
    latents = [row for each in results for row in each["latents"]]
    toy = [row for each in results for row in each["toy"]]
    shown = {**settings, "seeds": len(results)}
    found = correlations(latents)
    compared = comparison(methods, found, toy)
    pictures = [
        draw_bars(methods, folder / "bars.png"),
        draw_frequencies(latents, folder / "frequencies.png"),
        draw_latents(latents, folder / "latents.png"),
        draw_theory(toy, folder / "theory.png"),
    ]
    bars, frequencies, scatters, theory = ({path: PICTURES[path.name]} for path in pictures)
    return Page(
        "Feature suppression",
        QUESTION,
        _method(settings),
        shown,
        [
            Section("Methods", [_frozen(methods)], [_table(methods)], bars),
            Section("Averages over hooks", (), [_averages(methods)]),
            Section(
                "Which latents are suppressed",
                (),
                [_correlation_table(found)],
                frequencies | scatters,
            ),
            Section("Known features", [theory_text(toy)], [_toy_table(toy)], theory),
        ],
        compared,
        SOURCE,
        {
            "settings": shown,
            "methods": methods,
            "correlations": found,
            "toy": toy,
            "comparison": compared,
        },
        {"methods": methods, "latents": latents, "toy": toy},
        caution(_groups(methods)),
    )


def correlations(latents: Sequence[Row]) -> list[Row]:
    """`associations` of each seed and hook."""
    return [
        {"seed": seed, "hook": hook, **associations(select(latents, seed=seed, hook=hook))}
        for seed in sorted(distinct(latents, "seed"))
        for hook in distinct(latents, "hook")
    ]


def _method(settings: Mapping[str, Any]) -> list[str]:
    origin = (
        f"At each hook a ReLU SAE of {settings['d_sae']} latents is trained for "
        f"{settings['steps']} steps with the penalty's weight {settings['l1_coefficient']:g}"
        if settings["sae"] is None
        else "At each hook a trained SAE is given"
    )
    return [
        f"{origin}; activations are centred and scaled to mean norm sqrt(d_in). Copies are trained "
        f"for {settings['fine_tune_steps']} steps, from the same weights, on the same tokens and "
        "on one pass of the language model. With a scale s for each latent and without a penalty "
        "train, by method: scale s; decoder s, W_dec, b_dec; unrotated decoder s, b_dec; encoder "
        "s, W_enc, b_enc; unrotated encoder s, b_enc; unrotated all s, b_enc, b_dec. Baseline is "
        "the SAE itself, trained on with its penalty. Learning rates rise over the first 5 % and "
        "fall over the last quarter of the steps.",
        "All figures are of held-out text. MSE is summed over the width of the activations, in raw "
        "units. Removed and recovered are shares of the original SAE's squared error, and of the "
        "perplexity that it costs the language model: 0 is the original, 1 would be no error.",
        f"Dead latents are left out of correlations: those below the widest step of the sorted "
        f"frequency curve that begins below {RARE:g} and has at least {LEAST_GAP:g} decades, and "
        "those that never fire. What a latent is scaled by is s times the growth of its decoder "
        "row; what that adds is (scaling - 1) times its mean activation where it fires.",
    ]


def _frozen(methods: Sequence[Row]) -> str:
    own = [row for row in methods if row["method"] in ENCODER_IS_FROZEN]
    differing = sum(row["differing"] for row in own)
    return (
        f"With the encoder frozen ({', '.join(map(words, ENCODER_IS_FROZEN))}) the set of latents "
        f"that fire differs from the original's on {differing:,} held-out tokens, over all copies."
    )


COLUMNS: dict[str, tuple[str, str]] = {
    "l2_ratio": ("L2 ratio", ".3f"),
    "mse": ("MSE", ".4g"),
    "mse_removed": ("removed", ".3f"),
    "l0": ("L0", ".1f"),
    "dead": ("dead", ".0f"),
    "perplexity_spliced": ("perplexity", ".2f"),
    "perplexity_recovered": ("recovered", ".3f"),
    "ce_spliced": ("CE", ".3f"),
    "ce_clean": ("CE, clean", ".3f"),
}


def _table(methods: Sequence[Row]) -> Table:
    note = (
        f"The model's own perplexity is {methods[0]['perplexity_clean']:.2f}. "
        f"Dead: of {methods[0]['d_sae']}, those that never fire on {methods[0]['n_tokens']:,} "
        "tokens. Mean and standard deviation over seeds."
    )
    return figures_table(_groups(methods), COLUMNS, note)


def _groups(methods: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        f"{label}, {words(method)}": select(methods, hook=hook, method=method)
        for hook, label in short(distinct(methods, "hook")).items()
        for method in (ORIGINAL, *METHODS)
    }


def _averages(methods: Sequence[Row]) -> Table:
    names = ("mse_removed", "perplexity_recovered", "l2_ratio", "l0")
    rows = [
        [words(method), *(with_spread(of_method(methods, method, name)) for name in names)]
        for method in (ORIGINAL, *METHODS)
    ]
    headings = ["", "MSE removed", "perplexity gap recovered", "L2 ratio", "L0"]
    note = (
        "Means over hooks; their mean and standard deviation over seeds. Without an SAE the "
        f"model's cross-entropy is {methods[0]['ce_clean']:.3f} nats per token."
    )
    return Table(headings, rows, note)


def _correlation_table(found: Sequence[Row]) -> Table:
    labels = short(distinct(found, "hook"))
    rows = []
    for effect, label in (("scaling", "scaling"), ("added", "added activation")):
        for cause in ("log_strength", "log_frequency"):
            for partial in ("", ",partial"):
                name = f"{effect},{cause}{partial}"
                title = f"{label} and {cause.replace('_', ' ')}{', partial' if partial else ''}"
                rows.append([title, *(_spread(found, hook, name) for hook in labels)])
    rows.append(["cosine before and after", *(_spread(found, hook, "cosine") for hook in labels)])
    rows.append(["alive latents", *(_spread(found, hook, "living", ".0f") for hook in labels)])
    note = (
        "Correlations over alive latents, method decoder; partial ones hold the other of strength "
        "and frequency fixed."
    )
    return Table(["", *labels.values()], rows, note)


def _spread(found: Sequence[Row], hook: str, name: str, form: str = "+.3f") -> str:
    return with_spread(known(select(found, hook=hook), name), form, "-")


def _toy_table(toy: Sequence[Row]) -> Table:
    frequencies = sorted(distinct(toy, "frequency"))
    rows = []
    for coefficient in sorted(distinct(toy, "l1_coefficient")):
        own = select(toy, l1_coefficient=coefficient)
        worst = max(abs(row["learnt"] - row["predicted"]) for row in own)
        n, of = killed(own)
        rows.append(
            [
                f"{coefficient:g}",
                f"{coefficient / 2:g}",
                *(_shrinkage(own, frequency) for frequency in frequencies),
                f"{n} of {of}",
                f"{worst:.3f}",
            ]
        )
    headings = [
        "coefficient",
        "predicted",
        *(f"at frequency {frequency:.2g}" for frequency in frequencies),
        "killed below",
        "largest error",
    ]
    note = "Shrinkage of the features that live by theory: mean and standard deviation over them."
    return Table(headings, rows, note)


def _shrinkage(toy: Sequence[Row], frequency: float) -> str:
    alive = [row for row in select(toy, frequency=frequency) if row["predicted"] > 0]
    return with_spread([row["strength"] - row["learnt"] for row in alive])
