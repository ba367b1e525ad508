"""Tables, pictures and the page of the study of low activations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_sae.studies.low_activations.costs import (
    at_levels,
    first_places,
    frontier,
    halving,
    mean_rises,
    nearest,
)
from lightning_sae.studies.low_activations.measure import WAYS, WHOLE
from lightning_sae.studies.low_activations.plots import draw_frontier, draw_kinds, draw_ways
from lightning_sae.studies.shared.page import Compared, Page, Section, Table, caution
from lightning_sae.studies.shared.rows import Row, distinct, known, select, with_spread

SOURCE = (
    "Logan Riggs Smith, Improving SAE's by Sqrt()-ing L1 & Removing Lowest Activating Features "
    "(2024)"
)
SHORT = {
    "lowest_k": "lowest k",
    "share_of_maximum": "share of maximum",
    "quantile": "quantile",
    "global": "one threshold",
}


def report(
    folder: Path, settings: Row, results: Sequence[Row], families: Mapping[str, str]
) -> Page:
    """The study's page.

    Args:
        folder: The study's, for pictures.
        settings: The study's.
        results: Of each seed: `ce_clean`, and `points`.
        families: Of each SAE; SAEs of different families are not compared on the frontier.
    """
    halved, compared, points, levels = [], [], [], []
    for seed, each in enumerate(results):
        halved += [{"seed": seed, **row} for row in halving(each["points"])]
        compared += [{"seed": seed, **row} for row in frontier(each["points"], families)]
        points += [{"seed": seed, **point} for point in each["points"]]
        levels += [{"seed": seed, **row} for row in at_levels(each["points"], families)]
    several = len({*families.values()}) > 1
    clean = _clean(results)
    removal = draw_ways(points, folder / "removal.png")
    sweep = draw_frontier(points, families, folder / "frontier.png")
    return Page(
        "Removing low activations",
        "What does it cost to remove the lowest activations of a trained SAE, which way costs "
        "least, and does removing from a dense SAE beat training a sparse one?",
        _method(settings),
        {**settings, "seeds": len(results)},
        [
            Section(
                "Cross-entropy paid to halve L0",
                _ways_text(halved),
                [_ways_table(halved, clean)],
                {removal: REMOVAL},
            ),
            Section(
                "Do low activations matter for more than the squared error?",
                [f"Cross-entropy and squared error {_both_rise(halved)}."],
                [_costs_table(halved, clean)],
            ),
            Section(
                "Removing from a denser SAE, or training a sparser one?",
                [_verdict(compared)],
                [_frontier_table(compared, clean)],
                {sweep: "The sweep as trained, and each SAE of it under one threshold."},
            ),
            *([_by_kind(folder, families, points, compared, levels, clean)] if several else []),
        ],
        _comparison(halved, compared),
        SOURCE,
        {"settings": settings, "seeds": results, "halving": halved, "frontier": compared}
        | {"levels": levels},
        {"points": points, "halving": halved, "frontier": compared, "levels": levels},
        caution({sae: select(points, sae=sae, way=WHOLE) for sae in distinct(points, "sae")}),
    )


def _by_kind(
    folder: Path,
    families: Mapping[str, str],
    points: Sequence[Row],
    compared: Sequence[Row],
    levels: Sequence[Row],
    clean: str,
) -> Section:
    """Whether removing beats training for each kind of SAE and length of training."""
    pairs = [row | {"kind": families[row["trained"]]} for row in nearest(compared)]
    kinds = [kind for kind in dict.fromkeys(families.values()) if select(pairs, kind=kind)]
    picture = draw_kinds(points, families, folder / "kinds.png")
    return Section(
        "By kind of SAE and length of training",
        [kind_in_words(kind, select(pairs, kind=kind)) for kind in kinds],
        [_kinds_table(kinds, pairs, points, clean), _levels_table(levels)],
        {picture: KINDS},
    )


KINDS = (
    "Black: the sweep as trained, with the names of its SAEs. Coloured: each of them under one "
    "threshold, from low to high. Means over seeds, bars one standard deviation."
)


def kind_in_words(kind: str, pairs: Sequence[Row]) -> str:
    """Whether removing beats training for one kind, over its neighbours in the sweep and seeds."""
    gains = [row["ce_removed"] - row["ce"] for row in pairs]
    below = sum(gain < 0 for gain in gains)
    words = {len(gains): "in all", 0: "in none"}.get(below, f"in {below}")
    return (
        f"{kind}: under one threshold a denser neighbour has the lower cross-entropy {words} of "
        f"{len(gains)} pairs, by {-mean(gains):+.3f} nats on average "
        f"({-max(gains):+.3f} to {-min(gains):+.3f}; + is better than training)."
    )


def _kinds_table(
    kinds: Sequence[str], pairs: Sequence[Row], points: Sequence[Row], clean: str
) -> Table:
    lines = []
    for kind in kinds:
        own = select(pairs, kind=kind)
        differences = [
            [row[f"{figure}_removed"] - row[figure] for row in own] for figure in ("ce", "fvu")
        ]
        gammas = [
            point["gamma"]
            for point in select(points, way=WHOLE)
            if point["sae"] in {row["trained"] for row in own}
        ]
        below = sum(difference < 0 for difference in differences[0])
        lines.append(
            [
                kind,
                f"{below} of {len(own)}",
                with_spread(differences[0], "+.3f"),
                with_spread(differences[1], "+.4f"),
                with_spread(gammas),
            ]
        )
    note = (
        "Each SAE beside its denser neighbour in the sweep, whose activations below one threshold "
        "are removed until it has the same L0. Below 0, removing is better. gamma of the SAE as "
        "trained: below 1 its reconstructions are too small. Mean ± standard deviation over pairs "
        "and seeds."
    )
    headings = ["", "lower", "CE then - CE", "FVU then - FVU", "gamma as trained"]
    return Table(headings, lines, f"{note} {clean}")


def _levels_table(levels: Sequence[Row]) -> Table:
    kinds = distinct(levels, "family")
    lines = []
    for l0 in sorted(distinct(levels, "l0")):
        own = {kind: select(levels, family=kind, l0=l0) for kind in kinds}
        cells = (
            [with_spread(known(own[kind], figure), none="-") for figure in ("ce", "ce_removed")]
            for kind in kinds
        )
        lines.append([f"{l0:g}", *(" | ".join(cell) for cell in cells)])
    note = (
        "Cross-entropy at the same L0: of the sweep as trained | lowest of its SAEs under one "
        "threshold, both on straight lines over log L0."
    )
    return Table(["L0", *kinds], lines, note)


def _clean(results: Sequence[Row]) -> str:
    """The unchanged model's cross-entropy, as a reference."""
    return (
        f"Without an SAE the model's CE is {mean(each['ce_clean'] for each in results):.3f} nats."
    )


REMOVAL = (
    "What is left when the lowest activations of each SAE are removed; black dots are the SAEs as "
    "trained, with their names. Means over seeds, bars one standard deviation. The way that costs "
    "most goes beyond the upper edge. The error's two axes are the same figure in two units."
)


def _method(settings: Mapping[str, Any]) -> list[str]:
    trained = "Given SAEs are taken." if settings["sae"] else "ReLU SAEs of several L0 are trained."
    return [
        f"{trained} From each activation's code the lowest entries are removed: the k lowest of "
        "each token; those below a share of their latent's maximum; those below a quantile of "
        "their latent's firings; those below one threshold. What is left is decoded and put in the "
        "activation's place.",
        "Levels are those that remove the same shares of all firings in each way. Maxima, "
        "quantiles and thresholds are measured on training text, all figures on held-out text, "
        "every SAE, way and level on the same pass. An SAE encodes each activation once.",
        "Figures at an L0 between two measured ones lie on the straight line between them over "
        "log L0; outside of the measured range none are given.",
    ]


def _ways_table(rows: Sequence[Row], clean: str) -> Table:
    lines = []
    for sae in distinct(rows, "sae"):
        own = {way: select(rows, sae=sae, way=way) for way in WAYS}
        lines.append(
            [
                sae,
                with_spread(known(own["global"], "l0"), ".1f"),
                with_spread(known(own["global"], "ce")),
                *(with_spread(known(own[way], "ce_rise")) for way in WAYS),
            ]
        )
    note = (
        "L0 and cross-entropy of the whole SAE, then the rise of cross-entropy, in nats per token, "
        "when half of L0 is removed in each way."
    )
    return Table(["SAE", "L0", "cross-entropy", *SHORT.values()], lines, f"{note} {clean}")


def _ways_text(rows: Sequence[Row]) -> list[str]:
    first, rises = first_places(rows), mean_rises(rows)
    if not rises:
        return []
    order = sorted(rises, key=rises.__getitem__)
    listed = ", ".join(f"{WAYS[way]} {rises[way]:.3f}" for way in order)
    return [
        f"Mean cost of halving L0, in nats per token: {listed}. The cheapest for "
        f"{first[order[0]]} of {sum(first.values())} SAEs is: {WAYS[order[0]]}."
    ]


def _costs_table(rows: Sequence[Row], clean: str) -> Table:
    lines = []
    for sae in distinct(rows, "sae"):
        own = select(rows, sae=sae, way="global")
        shares = {
            figure: [
                100 * row[f"{figure}_rise"] / row[figure]
                for row in own
                if row["ce_rise"] is not None
            ]
            for figure in ("kl", "mse")
        }
        lines.append(
            [
                sae,
                *(with_spread(known(own, f"{figure}_rise")) for figure in ("ce", "kl", "fvu")),
                *(with_spread(values, ".0f") for values in shares.values()),
            ]
        )
    note = (
        "When one threshold halves L0. If low activations were noise that serves reconstruction "
        "alone, the squared error would rise and cross-entropy would not."
    )
    headings = ["SAE", "CE rise", "KL rise", "FVU rise", "KL rise, %", "MSE rise, %"]
    return Table(headings, lines, f"{note} {clean}")


def _both_rise(rows: Sequence[Row]) -> str:
    own = [row for row in select(rows, way="global") if row["ce_rise"] is not None]
    both = sum(row["ce_rise"] > 0 and row["mse_rise"] > 0 for row in own)
    return f"both rise for {both} of {len(own)} SAEs"


def _frontier_table(rows: Sequence[Row], clean: str) -> Table:
    lines = []
    for trained, removed_from in dict.fromkeys((r["trained"], r["removed_from"]) for r in rows):
        own = select(rows, trained=trained, removed_from=removed_from)
        lines.append(
            [
                trained,
                with_spread(known(own, "l0"), ".1f"),
                with_spread(known(own, "ce")),
                removed_from,
                with_spread(known(own, "ce_removed")),
                with_spread([row["ce_removed"] - row["ce"] for row in own], "+.3f"),
                with_spread([row["fvu_removed"] - row["fvu"] for row in own], "+.4f"),
            ]
        )
    headings = ["trained", "L0", "its CE", "removed from", "CE then", "CE then - its CE"]
    note = (
        "Each SAE beside denser ones of the sweep, whose activations below one threshold are "
        "removed until they have its L0. Below 0, removing is better than training."
    )
    return Table([*headings, "FVU then - its FVU"], lines, f"{note} {clean}")


def _verdict(rows: Sequence[Row]) -> str:
    if not rows:
        return "No SAE of the sweep comes down to the L0 of another: nothing can be compared."
    gains = [row["ce"] - row["ce_removed"] for row in rows]
    better = sum(gain > 0 for gain in gains)
    word = "less" if mean(gains) > 0 else "more"
    return (
        f"Removing has the lower cross-entropy in {better} of {len(rows)} pairs; on average it "
        f"costs {abs(mean(gains)):.3f} nats {word} than training a sparser SAE."
    )


def _comparison(halved: Sequence[Row], compared: Sequence[Row]) -> list[Compared]:
    found = []
    rises = known(select(halved, way="global"), "ce_rise")
    if rises:
        span = f"{min(rises):.3f} to {max(rises):.3f}, mean {mean(rises):.3f}"
        there = "about 0.08 (Pythia-70m-deduped, layer 3)"
        found.append(("cross-entropy paid to halve L0 by one threshold, nats", there, span))
    means, first = mean_rises(halved), first_places(halved)
    if means:
        best = min(means, key=means.__getitem__)
        here = f"{WAYS[best]}; cheapest for {first[best]} of {sum(first.values())} SAEs"
        found.append(("cheapest way of the four", WAYS["global"], here))
    if rises:
        there = "cross-entropy and squared error"
        found.append(("what rises when half of L0 goes", there, _both_rise(halved)))
    there = "SAEs of other L0 pay alike, and seem to follow one frontier"
    return [*found, ("across the sweep", there, _verdict(compared))]
