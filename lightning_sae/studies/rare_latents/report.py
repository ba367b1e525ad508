"""Tables, pictures and the page of the study of rare latents."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from lightning_sae.studies.rare_latents.plots import draw_directions, draw_shares
from lightning_sae.studies.rare_latents.settings import BASE, ORIGINS
from lightning_sae.studies.shared.page import Compared, Page, Section, Table, caution, figures_table
from lightning_sae.studies.shared.rows import Row, distinct, known, select, with_spread

SOURCE = (
    "Neel Nanda, Open Source Replication & Commentary on Anthropic's Dictionary Learning Paper "
    "(2023), and a comment on it"
)
SHARES = {
    "l0": ("L0", ".1f"),
    "fvu": ("FVU", ".3f"),
    "rare": ("rare", ".3f"),
    "never": ("never fires", ".3f"),
    "cosine_with_mean": ("rare with their mean", ".2f"),
    "others_with_mean": ("others with it", ".2f"),
}
DIRECTIONS = {
    "with_others": ("mean of the others", ".2f"),
    "with_initial": ("sum of initial decoder rows", ".2f"),
    "with_input": ("- mean input", ".2f"),
    "with_normal": ("normal, input", ".2f"),
    "with_data": ("- mean activation", ".2f"),
    "with_data_normal": ("normal, activations", ".2f"),
}
PLANES = {
    "random_fires": ("random fires", ".4f"),
    "ends_fire": ("after descent", ".6f"),
    "ends_alike": ("ends with each other", ".2f"),
    "ends_with_rare": ("largest with rare", ".2f"),
    "rare_moved": ("rare rows with their ends", ".3f"),
}
CHOSEN = {
    "chosen": ("rare then", ".0f"),
    "still_rare": ("still rare", ".2f"),
    "rarer": ("rarer, of those that fired", ".2f"),
    "median_at_choice": ("median frequency then", ".1e"),
    "median_at_end": ("at the end", ".1e"),
}


def report(folder: Path, settings: Row, results: Sequence[Sequence[Row]]) -> Page:
    """The study's page.

    Args:
        folder: The study's, for pictures.
        settings: The study's.
        results: Of each seed, a row for each SAE.
    """
    rows = [row for each in results for row in each]
    between = list(between_seeds(rows))
    groups = {label(row): select(rows, sae=row["sae"]) for row in results[0]}
    directed = {name: own for name, own in groups.items() if known(own, "with_others")}
    long = {name: own for name, own in groups.items() if own[0]["length"] != 1}
    shown = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
    return Page(
        "Rare latents",
        "How many latents of an SAE fire on less than 1e-4 of activations, and where does the "
        "direction come from that their encoder rows share?",
        METHOD,
        {**settings, "seeds": len(results)},
        [
            Section(
                "Their share",
                [shares_in_words(rows)],
                [figures_table(groups, SHARES, SHARES_NOTE)],
                {draw_shares(rows, folder / "shares.png"): SHARES_CAPTION},
            ),
            Section(
                "Their common direction",
                list(directions_in_words(rows, between)),
                [_directions(directed, between)],
                {draw_directions(rows, between, folder / "directions.png"): DIRECTIONS_CAPTION},
            ),
            Section("Is there one hyperplane?", [], [figures_table(directed, PLANES, PLANES_NOTE)]),
            Section("Are they dying?", [], [figures_table(long, CHOSEN, CHOSEN_NOTE)]),
        ],
        _comparison(rows, between),
        SOURCE,
        {"settings": settings, "saes": shown, "between_seeds": between},
        {"saes": shown, "over_time": list(_over_time(rows)), "between_seeds": between},
        caution(groups),
    )


METHOD = [
    "ReLU SAEs with unit decoder rows. At each hook one is the base; the others differ from it in "
    "one respect. A latent is rare if the trained SAE fires it on less than 1e-4 of the counted "
    "activations, of training text. Activations are not centred; b_dec starts at the mean or at "
    "zero, or the encoder's input is the activation itself.",
    "The common direction is the mean of the rare latents' encoder rows. It is compared with that "
    "of other seeds, and with: the mean of the other rows; the sum of the decoder rows before "
    "training; minus the mean of the encoder's input; and the normal w = -(C + eI)^-1 mu of a "
    "hyperplane that has as much of the input as possible on one side. The last two are given for "
    "the encoder's input and for the activations, which is from the data alone.",
    "Hyperplanes: 16 random directions get the median offset of the rare latents and are turned "
    "downhill on the mean of their activation, with norm 1.",
]
SHARES_NOTE = (
    "Median cosines of encoder rows with the mean of the rare ones. Mean ± standard deviation over "
    "seeds."
)
SHARES_CAPTION = (
    "Left: share of rare latents of the base at several widths. Right: over the long runs, counted "
    "on the training activations of windows of 5 % of the run. Bars one standard deviation."
)
DIRECTIONS_CAPTION = (
    "Cosines of the rare latents' common direction, by what the encoder's input is measured from: "
    "with the same in another seed, with directions that do not depend on rare latents. Each point "
    "is an SAE of one seed, or a pair of seeds."
)
PLANES_NOTE = (
    "Share of activations on which a latent fires that has a random direction and the rare "
    "latents' offset, before and after it is turned downhill; mean cosine of the ends with each "
    "other, which is 1 if there is one direction to approach; largest cosine of an end with the "
    "rare latents' common direction; median cosine of a rare row with where it ends."
)
CHOSEN_NOTE = (
    "Latents that are rare after 30 % of a long run, and what becomes of them: the share that is "
    "rare in the last window, and of those that fired at all when they were chosen, the share that "
    "fires less in the last window."
)


def label(row: Row) -> str:
    """An SAE in tables and pictures: its hook and the settings that vary."""
    times = "" if row["length"] == 1 else f", {row['length']:g} times as long"
    times += ", slow warm-up" if row["slow"] else ""
    return (
        f"{row['hook'].replace('hook_', '')}, {row['d_sae']}, {row['penalty']} "
        f"{row['coefficient']:g}, {ORIGINS[row['origin']]}{times}"
    )


def between_seeds(rows: Sequence[Row]) -> Iterator[Row]:
    """Cosine of the common direction, for each SAE and pair of seeds with rare latents."""
    for sae in distinct(rows, "sae"):
        own = [row for row in select(rows, sae=sae) if row.get("direction")]
        for one, other in combinations(own, 2):
            cosine = float(np.dot(one["direction"], other["direction"]))
            yield {
                **{k: one[k] for k in ("sae", "hook", "d_sae", "origin", "length")},
                "seeds": f"{one['seed']}, {other['seed']}",
                "cosine": cosine,
            }


def shares_in_words(rows: Sequence[Row]) -> str:
    """Whether the share of rare latents rises with width and with length, hook by hook."""
    sentences = []
    for hook in distinct(rows, "hook"):
        own = select(rows, hook=hook, origin=BASE)
        first = own[0]["coefficient"]
        base = select(own, coefficient=first, penalty="L1")
        curves = [
            [row["rare"] for row in sorted(select(base, seed=s, length=1.0), key=_width)]
            for s in distinct(base, "seed")
        ]
        ends = [(curve[0], curve[-1]) for curve in curves if len(curve) > 1]
        if ends:
            low, high = (mean(values) for values in zip(*ends, strict=True))
            rising = sum(all(np.diff(curve) >= 0) for curve in curves)
            widths = sorted({row["width"] for row in base})
            sentences.append(
                f"{hook}: {low:.1%} of latents are rare at {widths[0]:g} times the width, "
                f"{high:.1%} at {widths[-1]:g}; the share never falls in between in {rising} of "
                f"{len(curves)} seeds."
            )
        sentences += _length_in_words(hook, base)
    return " ".join(sentences)


def _width(row: Row) -> float:
    return float(row["width"])


def _length_in_words(hook: str, base: Sequence[Row]) -> Iterator[str]:
    long = [row for row in base if row["length"] != 1]
    for length, slow in dict.fromkeys((row["length"], row["slow"]) for row in long):
        own = select(long, length=length, slow=slow)
        short = select(base, length=1.0, d_sae=own[0]["d_sae"])
        yield (
            f"{hook}: {mean(known(short, 'rare')):.1%} are rare after the usual length and "
            f"{mean(known(own, 'rare')):.1%} after {length:g} times that, with warm-ups "
            f"{'longer by the same factor' if slow else 'of as many steps'}."
        )


def directions_in_words(rows: Sequence[Row], between: Sequence[Row]) -> Iterator[str]:
    """By origin: whether seeds share the direction, and which direction predicts it best."""
    for origin, words in ORIGINS.items():
        own = [row for row in select(rows, origin=origin) if row.get("with_others") is not None]
        if own:
            cosines = known(select(between, origin=origin), "cosine")
            means = {key: mean(known(own, key)) for key in DIRECTIONS if key != "with_others"}
            best = max(means, key=means.__getitem__)
            seeds = f" {with_spread(cosines, '.2f')} with that of another seed," if cosines else ""
            yield (
                f"{words}: the common direction has a cosine of{seeds} "
                f"{with_spread(known(own, 'with_others'), '.2f')} with the mean of the other rows; "
                f"of the predictions the nearest is {DIRECTIONS[best][0]}, "
                f"{with_spread(known(own, best), '.2f')}."
            )


def _directions(groups: Mapping[str, Sequence[Row]], between: Sequence[Row]) -> Table:
    table = figures_table(groups, DIRECTIONS)
    lines = []
    for (name, *cells), own in zip(table.rows, groups.values(), strict=True):
        cosines = known(select(between, sae=own[0]["sae"]), "cosine")
        lines.append([name, with_spread(cosines, ".2f", "-"), *cells])
    note = "Cosines of the rare latents' common direction. Mean ± standard deviation over seeds."
    return Table(["", "another seed", *table.headings[1:]], lines, note)


def _over_time(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        silent = row.get("silent") or [None] * len(row.get("steps", []))
        for step, rare, none in zip(
            row.get("steps", []), row.get("rare_over_time", []), silent, strict=True
        ):
            yield {"sae": row["sae"], "seed": row["seed"], "step": step, "rare": rare} | (
                {"silent_of_chosen": none}
            )


def _comparison(rows: Sequence[Row], between: Sequence[Row]) -> list[Compared]:
    def seen(values: Sequence[Any], form: str = ".2f") -> str:
        return with_spread(list(values), form, "no rare latents")

    cosines = {
        words: known(select(between, origin=origin), "cosine") for origin, words in ORIGINS.items()
    }
    here = "; ".join(f"{words}: {seen(values)}" for words, values in cosines.items())
    return [
        ("cosine of the rare mean between seeds", ".96", here),
        (
            "rare encoder rows with their mean",
            "97.5 % above .95",
            seen(known(rows, "alike"), ".1%"),
        ),
        (
            "dying slowly: rare latents become rarer",
            "expected by the commenter",
            f"{seen(known(rows, 'rarer'), '.0%')} of those that fired after 30 % of a long run",
        ),
    ]
