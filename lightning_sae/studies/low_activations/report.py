"""Tables, pictures and the page of the study of low activations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_sae.studies.low_activations.figures import (
    Row,
    first_places,
    frontier,
    halving,
    mean_rises,
)
from lightning_sae.studies.low_activations.plots import draw_frontier, draw_ways
from lightning_sae.studies.low_activations.removing import WAYS
from lightning_sae.studies.shared.folder import SETTINGS, write_csv, write_json
from lightning_sae.studies.shared.page import Page, Section, Table, with_spread

Results = Sequence[Mapping[str, Any]]
"""Of each seed: `ce_clean`, and `points`."""

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


def report(folder: Path, families: Mapping[str, str], results: Results) -> tuple[Page, list[Path]]:
    """Write everything the study makes.

    Args:
        folder: The study's.
        families: Of each SAE: only those of one family are compared on the frontier.
        results: Of each seed.

    Returns:
        The page, and all files.
    """
    halved = [
        {"seed": s, **row} for s, each in enumerate(results) for row in halving(each["points"])
    ]
    compared = [
        {"seed": s, **row}
        for s, each in enumerate(results)
        for row in frontier(each["points"], families)
    ]
    points = [{"seed": s, **point} for s, each in enumerate(results) for point in each["points"]]
    settings = json.loads((folder / SETTINGS).read_text())
    everything = {"settings": settings, "seeds": list(results), "halving": halved}
    pictures = {
        draw_ways(
            points, folder / "removal.png"
        ): "What is left when the lowest activations of each "
        "SAE are removed; black dots are the SAEs as trained. Means over seeds, bars one standard "
        "deviation. The way that costs most goes beyond the upper edge. The error's two axes are "
        "the same figure in two units.",
        draw_frontier(points, families, folder / "frontier.png"): "The sweep as trained, and each "
        "SAE of it under one threshold.",
    }
    page = Page(
        title="Removing low activations",
        question="What does it cost to remove the lowest activations of a trained SAE, which way "
        "costs least, and does removing from a dense SAE beat training a sparse one?",
        method=_method(settings),
        settings={**settings, "seeds": len(results)},
        sections=[
            _ways_section(halved, pictures),
            _costs_section(halved),
            _frontier_section(compared, pictures),
        ],
        comparison=_comparison(halved, compared),
        source=SOURCE,
    )
    made = [
        write_json(folder / "results.json", {**everything, "frontier": compared}),
        write_csv(folder / "points.csv", points),
        write_csv(folder / "halving.csv", halved),
        write_csv(folder / "frontier.csv", compared),
        *pictures,
        page.write(folder / "report.html"),
    ]
    return page, made


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


# Tables.


def _rises(rows: Sequence[Row], sae: str, way: str, figure: str) -> list[float]:
    found = [row[f"{figure}_rise"] for row in rows if (row["sae"], row["way"]) == (sae, way)]
    return [value for value in found if value is not None]


def _cell(values: Sequence[float], form: str = ".3f") -> str:
    return with_spread(values, form) if values else ""


def _whole(rows: Sequence[Row], sae: str, figure: str) -> list[float]:
    return [row[figure] for row in rows if (row["sae"], row["way"]) == (sae, "global")]


def _saes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["sae"] for row in rows))


def _ways_section(rows: Sequence[Row], pictures: Mapping[Path, str]) -> Section:
    table = Table(
        ["SAE", "L0", "cross-entropy", *SHORT.values()],
        [
            [
                sae,
                _cell(_whole(rows, sae, "l0"), ".1f"),
                _cell(_whole(rows, sae, "ce")),
                *(_cell(_rises(rows, sae, way, "ce")) for way in WAYS),
            ]
            for sae in _saes(rows)
        ],
        "L0 and cross-entropy of the whole SAE, then the rise of cross-entropy, in nats per token, "
        "when half of L0 is removed in each way.",
    )
    first, rises = first_places(rows), mean_rises(rows)
    text = []
    if rises:
        order = sorted(rises, key=rises.__getitem__)
        listed = ", ".join(f"{WAYS[way]} {rises[way]:.3f}" for way in order)
        text.append(
            f"Mean cost of halving L0, in nats per token: {listed}. {_capital(WAYS[order[0]])} is "
            f"the cheapest for {first[order[0]]} of {sum(first.values())} SAEs."
        )
    return Section("Cross-entropy paid to halve L0", text, [table], _first(pictures))


def _costs_section(rows: Sequence[Row]) -> Section:
    def relative(sae: str, figure: str) -> list[float]:
        own = [row for row in rows if (row["sae"], row["way"]) == (sae, "global")]
        return [
            100 * row[f"{figure}_rise"] / row[figure] for row in own if row["ce_rise"] is not None
        ]

    table = Table(
        ["SAE", "CE rise", "KL rise", "FVU rise", "KL rise, %", "MSE rise, %"],
        [
            [
                sae,
                *(_cell(_rises(rows, sae, "global", figure)) for figure in ("ce", "kl", "fvu")),
                *(_cell(relative(sae, figure), ".0f") for figure in ("kl", "mse")),
            ]
            for sae in _saes(rows)
        ],
        "When one threshold halves L0. If low activations were noise that serves reconstruction "
        "alone, the squared error would rise and cross-entropy would not.",
    )
    rises = [row for row in rows if row["way"] == "global" and row["ce_rise"] is not None]
    both = sum(row["ce_rise"] > 0 and row["mse_rise"] > 0 for row in rises)
    text = f"Cross-entropy and squared error both rise for {both} of {len(rises)} SAEs."
    return Section("Do low activations matter for more than the squared error?", [text], [table])


def _frontier_section(rows: Sequence[Row], pictures: Mapping[Path, str]) -> Section:
    pairs = dict.fromkeys((row["trained"], row["removed_from"]) for row in rows)
    table = Table(
        [
            "trained",
            "L0",
            "its CE",
            "removed from",
            "CE then",
            "CE then - its CE",
            "FVU then - its FVU",
        ],
        [_frontier_row([row for row in rows if _pair(row) == pair]) for pair in pairs],
        "Each SAE beside denser ones of the sweep, whose activations below one threshold are "
        "removed until they have its L0. Below 0, removing is better than training.",
    )
    return Section(
        "Removing from a denser SAE, or training a sparser one?",
        [_verdict(rows)],
        [table],
        dict(list(pictures.items())[1:]),
    )


def _pair(row: Row) -> tuple[str, str]:
    return row["trained"], row["removed_from"]


def _frontier_row(rows: Sequence[Row]) -> list[str]:
    return [
        rows[0]["trained"],
        _cell([row["l0"] for row in rows], ".1f"),
        _cell([row["ce"] for row in rows]),
        rows[0]["removed_from"],
        _cell([row["ce_removed"] for row in rows]),
        _cell([row["ce_removed"] - row["ce"] for row in rows], "+.3f"),
        _cell([row["fvu_removed"] - row["fvu"] for row in rows], "+.4f"),
    ]


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


def _comparison(halved: Sequence[Row], compared: Sequence[Row]) -> list[tuple[str, str, str]]:
    rises = [
        row["ce_rise"] for row in halved if row["way"] == "global" and row["ce_rise"] is not None
    ]
    means, first = mean_rises(halved), first_places(halved)
    found = []
    if rises:
        span = f"{min(rises):.3f} to {max(rises):.3f}, mean {mean(rises):.3f}"
        told = "about 0.08 (Pythia-70m-deduped, layer 3)"
        found.append(("cross-entropy paid to halve L0 by one threshold, nats", told, span))
    if means:
        best = min(means, key=means.__getitem__)
        told = f"{WAYS[best]}; cheapest for {first[best]} of {sum(first.values())} SAEs"
        found.append(("cheapest way of the four", WAYS["global"], told))
    own = [row for row in halved if row["way"] == "global" and row["ce_rise"] is not None]
    if own:
        both = sum(row["ce_rise"] > 0 and row["mse_rise"] > 0 for row in own)
        told = f"both rise for {both} of {len(own)} SAEs"
        found.append(("what rises when half of L0 goes", "cross-entropy and squared error", told))
    told = "SAEs of other L0 pay alike, and seem to follow one frontier"
    return [*found, ("across the sweep", told, _verdict(compared))]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _first(pictures: Mapping[Path, str]) -> dict[Path, str]:
    return dict(list(pictures.items())[:1])
