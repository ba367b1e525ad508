"""Tables, pictures and the page of the study of broken latents on a language model."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median

from lightning_sae.studies.broken_latents_lm.measure import scalars
from lightning_sae.studies.broken_latents_lm.plots import draw_cost, draw_histograms
from lightning_sae.studies.broken_latents_lm.settings import NONE, RULES, TIED, UNTIED
from lightning_sae.studies.shared.page import Compared, Page, Section, Table, caution, figures_table
from lightning_sae.studies.shared.rows import Row, distinct, known, select, with_spread

SOURCE = (
    "Chanin et al., Broken latents: studying SAEs and feature co-occurrence in toy models (2024)"
)
ALIKE = 0.005  # nats within which two SAEs count as nearly the same
MAIN = {
    "l0": ("L0", ".1f"),
    "fvu": ("FVU", ".3f"),
    "ce_added": ("nats added", ".3f"),
    "absorbed": ("absorbed", ".3f"),
    "in_full": ("in full", ".3f"),
    "own": ("latents per property", ".2f"),
    "precision": ("firings with it", ".2f"),
    "recall": ("fires with it", ".2f"),
    "token_1": ("probe, 1", ".3f"),
    "token_5": ("probe, 5", ".3f"),
    "dead": ("dead", ".3f"),
}
CHANGES = {
    "fvu": ("FVU", "+.3f"),
    "ce_added": ("nats added", "+.2f"),
    "absorbed": ("absorbed", "+.2f"),
    "precision": ("firings with it", "+.2f"),
    "recall": ("fires with it", "+.2f"),
    "token_1": ("probe, 1", "+.3f"),
    "token_5": ("probe, 5", "+.3f"),
}
PEAKS = {
    "two_peaks": ("two peaks", ".2f"),
    "separation": ("D", ".2f"),
    "dips": ("with a dip", ".2f"),
    "below_share": ("firings up to .7", ".3f"),
    "below_valley": ("up to the valley", ".2f"),
    "overlap": ("overlap", ".2f"),
}
PARTS = {
    "cos2": ("mean squared cosine", ".4f"),
    "of_silent": ("from silent pairs", ".2f"),
    "opposite": ("of a negative cosine", ".2f"),
    "of_weak": ("from weak firings", ".2f"),
}
OWN = {
    "fraction": ("absorbed", ".2f"),
    "fires_with": ("fires with it", ".2f"),
    "fires_without": ("without", ".3f"),
    "of_property": ("firings with it", ".2f"),
    "of_low": ("weak firings", ".2f"),
    "of_top": ("strongest tenth", ".2f"),
    "overlap": ("overlap", ".2f"),
}


def report(folder: Path, settings: Row, results: Sequence[Sequence[Row]]) -> Page:
    """The study's page.

    Args:
        folder: The study's, for pictures.
        settings: The study's.
        results: Of each seed, a row for each SAE.
    """
    rows = [row | _of_own_latents(row) for each in results for row in each]
    groups = {label(row): select(rows, sae=row["sae"]) for row in results[0]}
    properties = list(_properties(rows))
    shown = scalars(rows)
    return Page(
        "Broken latents on a language model",
        "Does the orthogonality loss make latents of a language model's SAE less broken, and what "
        "does it cost?",
        METHOD,
        {**settings, "seeds": len(results)},
        [
            Section(
                "What the loss costs and gains",
                [*gains_in_words(rows), *noise_in_words(rows)],
                [figures_table(groups, MAIN, MAIN_NOTE), _changes(rows)],
                {draw_cost(rows, folder / "cost.png"): COST_CAPTION},
            ),
            Section(
                "Peaks",
                [],
                [figures_table(groups, PEAKS, PEAKS_NOTE)],
                {
                    draw_histograms(_drawn(results[0]), folder / "histograms.png"): (
                        HISTOGRAMS_CAPTION
                    )
                },
            ),
            Section("What the loss is made of", [], [figures_table(groups, PARTS, PARTS_NOTE)]),
            Section(
                "The latents of properties",
                [],
                [_own_latents(select(properties, rule=NONE), kind) for kind in (UNTIED, TIED)],
            ),
        ],
        _comparison(rows),
        SOURCE,
        {"settings": settings, "saes": rows},
        {"saes": shown, "properties": properties},
        caution(groups),
    )


METHOD = [
    "All SAEs of a seed are trained on the same activations, and steered to the same L0, so that "
    "absorption and errors are not those of sparser or denser codes. The auxiliary loss is off for "
    "a third of the run, then its weight and threshold rise for a third.",
    "The loss is the mean over pairs of an input and a latent of the squared cosine of encoder "
    "input and encoder row. By rule it is over: pairs up to .7 of a latent's largest activation, "
    "silent ones included, as in the source; pairs up to the valley between two fitted peaks, or "
    ".05 of the largest activation where there is one peak; firings alone, up to .7; and, of "
    "latents with two peaks, firings of the lower, the higher or the smaller peak. Firings are "
    "few, so that the loss over them has 100 times the weight.",
    "Absorption is measured for properties of tokens that a probe finds in the activation. A "
    "property's own latents are those of the smallest sparse probe; the fraction is the share of "
    "the tokens' projection on the probe that other latents have taken over.",
]
MAIN_NOTE = (
    "Nats added: cross-entropy with the reconstruction in place of the activation, less that "
    "without. Absorbed and in full: means over properties. Firings with it: share of the firings "
    "of a property's own latent that have the property; fires with it: share of the tokens with "
    "the property on which it fires; means over properties. Probe: accuracy of the best one and "
    "five latents, mean over properties. Mean ± standard deviation over seeds."
)
CHANGES_NOTE = "Changes against the SAE without the loss of the same kind, width and seed."
COST_CAPTION = (
    "Absorption against nats added. Open marks have no auxiliary loss; larger marks have a larger "
    "weight. Bars one standard deviation over seeds."
)
PEAKS_NOTE = (
    "Of latents that fire 100 times or more: the share with two peaks by the mixture (D above 2), "
    "the median of D, the share with a dip to half between two peaks, the median share of firings "
    "up to .7 of the largest and, where there are two peaks, up to the valley. Overlap: common "
    "area of the activations of a property's own latent with the property and without it."
)
HISTOGRAMS_CAPTION = (
    "Activations of the own latents of the most frequent properties, first seed and width, on "
    "tokens with the property and without it. The dotted line is at .7 of the largest activation."
)
PARTS_NOTE = (
    "The loss with the source's threshold of .7 on the trained SAEs, without its weight; the share "
    "of it from silent pairs, from silent pairs with a negative cosine, and from weak firings. "
    "Random directions have a mean squared cosine of 1 / d_in."
)
OWN_NOTE = (
    "Its own latent: share of the tokens with the property, and without it, on which it fires; "
    "share of its firings that have the property, of those up to .7 of its largest activation, and "
    "of its strongest tenth; overlap of activations with and without it."
)


def label(row: Row) -> str:
    """Name of an SAE in tables."""
    name = f"{row['kind']}, {row['d_sae']}: {RULES[row['rule']].label}"
    return f"{name}, {row['coefficient']:g}" if row["coefficient"] else name


def _of_own_latents(row: Row) -> Row:
    """Means over properties of how exactly their own latents fire."""
    own = row["properties"].values()
    return {
        "precision": mean(each["of_property"] for each in own) if own else None,
        "recall": mean(each["fires_with"] for each in own) if own else None,
    }


def changes(rows: Sequence[Row]) -> Iterator[Row]:
    """For each SAE with the loss, the changes against that without of the same kind and seed."""
    for before in select(rows, rule=NONE):
        same = {name: before[name] for name in ("kind", "d_sae", "seed")}
        for row in select(rows, **same):
            if row["rule"] != NONE:
                known_both = [c for c in CHANGES if None not in (row.get(c), before.get(c))]
                yield row | {c: row[c] - before[c] if c in known_both else None for c in CHANGES}


def _changes(rows: Sequence[Row]) -> Table:
    found = list(changes(rows))
    groups = {label(row): select(found, sae=row["sae"]) for row in found}
    return figures_table(groups, CHANGES, CHANGES_NOTE)


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """The SAEs whose histograms are drawn: untied and tied of the first width, least weights."""
    first = select(rows, d_sae=rows[0]["d_sae"])
    drawn = []
    for kind in (UNTIED, TIED):
        for rule in (NONE, "share", "low"):
            own = select(first, kind=kind, rule=rule)
            drawn += sorted(own, key=lambda row: float(row["coefficient"]))[:1]
    return drawn


def noise_in_words(rows: Sequence[Row]) -> Iterator[str]:
    """How far absorption differs between SAEs that add the same to the cross-entropy."""
    known_rows = [row for row in rows if row["absorbed"] is not None]
    alike = [
        abs(a["absorbed"] - b["absorbed"])
        for a, b in combinations(known_rows, 2)
        if all(a[key] == b[key] for key in ("kind", "d_sae", "seed"))
        and abs(a["ce_added"] - b["ce_added"]) < ALIKE
    ]
    if alike:
        yield (
            f"Of SAEs of one kind, width and seed, {len(alike)} pairs add the same to the "
            f"cross-entropy within {ALIKE:g} nats. Their absorption differs by {median(alike):.3f} "
            f"in the median, and by up to {max(alike):.3f}: differences of this size are no "
            "evidence."
        )


def gains_in_words(rows: Sequence[Row]) -> Iterator[str]:
    """For each kind and width, the SAEs with the loss against that without."""
    for d_sae in distinct(rows, "d_sae"):
        for kind in distinct(rows, "kind"):
            own = select(rows, d_sae=d_sae, kind=kind)
            without = select(own, rule=NONE)
            pairs = [
                (with_loss, before)
                for before in without
                for with_loss in select(own, seed=before["seed"])
                if with_loss["rule"] != NONE
                and None not in (with_loss["absorbed"], before["absorbed"])
            ]
            if not pairs:
                continue
            less = [a for a, b in pairs if a["absorbed"] < b["absorbed"]]
            free = [a for a, b in pairs if a in less and a["ce_added"] <= b["ce_added"]]
            yield (
                f"{kind}, {d_sae} latents: of {len(pairs)} SAEs with the loss (rules, weights and "
                f"seeds), {len(less)} have less absorption than that without of the same seed, and "
                f"{len(free)} of these add no more to the cross-entropy."
            )


def _properties(rows: Sequence[Row]) -> Iterator[Row]:
    """A row for each SAE and property."""
    for row in rows:
        names = ("sae", "kind", "d_sae", "rule", "coefficient", "seed")
        for name, figures in row["properties"].items():
            plain = {key: value for key, value in figures.items() if not isinstance(value, list)}
            yield {**{key: row[key] for key in names}, "property": name, **plain}


def _own_latents(rows: Sequence[Row], kind: str) -> Table:
    own = select(rows, kind=kind)
    groups: Mapping[str, Sequence[Row]] = {
        f"{kind}, {d_sae}: {name}": select(own, property=name, d_sae=d_sae)
        for d_sae in distinct(own, "d_sae")
        for name in distinct(own, "property")
    }
    return figures_table(groups, OWN, OWN_NOTE)


def _comparison(rows: Sequence[Row]) -> list[Compared]:
    without = select(rows, rule=NONE)

    def seen(column: str, form: str, of: Sequence[Row] = without) -> str:
        return with_spread(known(of, column), form, "not measured")

    lines: list[Compared] = [
        (
            "peaks of latents overlap",
            "suspected",
            f"overlap {seen('overlap', '.2f')}, two peaks by the mixture for "
            f"{seen('two_peaks', '.0%')} of latents, with a dip for {seen('dips', '.0%')}",
        ),
    ]
    found = list(changes(select(rows, kind=TIED)))
    for name, words in (("share", "threshold .7"), ("mixture", "a mixture's threshold")):
        own = select(found, rule=name)
        there = "struggled" if name == "share" else "proposed"
        here = f"absorption {seen('absorbed', '+.2f', own)}, nats {seen('ce_added', '+.2f', own)}"
        lines.append((f"tied, {words}", there, f"{here}, over widths, weights and seeds"))
    return lines
