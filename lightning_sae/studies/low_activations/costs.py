"""The cost of halving L0, and whether removing from a dense SAE beats training a sparse one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from lightning_sae.studies.low_activations.measure import WAYS, WHOLE
from lightning_sae.studies.shared.frontier import Curve
from lightning_sae.studies.shared.rows import Row, distinct, select

FIGURES = ("ce", "kl", "mse", "fvu")


def of_way(points: Sequence[Row], sae: str, way: str) -> list[Row]:
    """The points of one SAE and way, and that of the whole SAE."""
    return [point for point in select(points, sae=sae) if point["way"] in (WHOLE, way)]


def names(points: Sequence[Row]) -> list[str]:
    """The SAEs, densest first."""
    whole = sorted(select(points, way=WHOLE), key=lambda point: -point["l0"])
    return distinct(whole, "sae")


def value_at(points: Sequence[Row], figure: str, l0: float) -> float | None:
    """A figure at some L0, interpolated over log L0; None outside of the measured range."""
    curve = Curve.of([(point["l0"], point[figure]) for point in points])
    if curve is None or not curve.log_l0[0] <= math.log(l0) <= curve.log_l0[-1]:
        return None
    return curve.at(math.log(l0))


def halving(points: Sequence[Row]) -> list[Row]:
    """For each SAE and way, the increase of each figure when half of L0 is removed.

    Returns:
        Rows with `sae`, `way`, the whole SAE's `l0`, `ce`, `kl`, `mse` and `fvu`, and the rises
        `ce_rise` and so on, None where no level removes so much.
    """
    rows = []
    for sae in names(points):
        for way in WAYS:
            own = of_way(points, sae, way)
            whole = own[0]
            row = {"sae": sae, "way": way, "l0": whole["l0"]}
            for figure in FIGURES:
                there = value_at(own, figure, whole["l0"] / 2)
                row[figure] = whole[figure]
                row[f"{figure}_rise"] = None if there is None else there - whole[figure]
            rows.append(row)
    return rows


def frontier(points: Sequence[Row], families: Mapping[str, str], way: str = "global") -> list[Row]:
    """Each SAE beside denser ones of its family, reduced to its L0 by removing activations.

    Args:
        points: Of one seed.
        families: Of each SAE; SAEs of different families are not compared.
        way: The way of removing.

    Returns:
        Rows with `trained`, its `l0`, `ce` and `fvu`; `removed_from`, and `ce_removed` and
        `fvu_removed` of that.
    """
    return list(_pairs(points, families, way))


def _pairs(points: Sequence[Row], families: Mapping[str, str], way: str) -> Iterator[Row]:
    order = names(points)
    for place, sparse in enumerate(order):
        whole = of_way(points, sparse, WHOLE)[0]
        for dense in order[:place]:
            own = of_way(points, dense, way)
            ce, fvu = (value_at(own, figure, whole["l0"]) for figure in ("ce", "fvu"))
            if families[dense] == families[sparse] and ce is not None:
                yield {
                    "trained": sparse,
                    "l0": whole["l0"],
                    "ce": whole["ce"],
                    "fvu": whole["fvu"],
                    "removed_from": dense,
                    "ce_removed": ce,
                    "fvu_removed": fvu,
                }


def nearest(rows: Sequence[Row]) -> list[Row]:
    """Of the pairs of `frontier`, with `seed`, those with the next denser SAE that can be reduced.

    Each has the `kind` of its SAEs if the rows have it.
    """
    return list({(row["seed"], row["trained"]): row for row in rows}.values())


def at_levels(points: Sequence[Row], families: Mapping[str, str], way: str = "global") -> list[Row]:
    """Cross-entropy at the same L0 for each family: of its sweep, and under a threshold.

    Args:
        points: Of one seed.
        families: Of each SAE.
        way: The way of removing.

    Returns:
        Rows with `family`, `l0`, a power of two that the sweep covers, `ce` on the straight line
        between the SAEs as trained, and `ce_removed`, the lowest of any SAE of the family from
        which activations are removed down to that L0; None if no measured level reaches it.
    """
    rows = []
    for family in dict.fromkeys(families.values()):
        own = [name for name in names(points) if families[name] == family]
        whole = [point for name in own for point in of_way(points, name, WHOLE)]
        for l0 in (2.0**power for power in range(12)):
            trained = value_at(whole, "ce", l0)
            reached = [value_at(of_way(points, name, way), "ce", l0) for name in own]
            known = [ce for ce in reached if ce is not None]
            if trained is not None:
                removed = min(known) if known else None
                rows.append({"family": family, "l0": l0, "ce": trained, "ce_removed": removed})
    return rows


def first_places(rows: Sequence[Row]) -> dict[str, int]:
    """For how many SAEs and seeds halving L0 costs the least cross-entropy, by way.

    Args:
        rows: Of `halving`, of all seeds, with `seed`; SAEs that not all ways can halve are left
            out.
    """
    found = dict.fromkeys(WAYS, 0)
    for rises in _rises_of_all_ways(rows):
        found[min(rises, key=rises.__getitem__)] += 1
    return found


def mean_rises(rows: Sequence[Row]) -> dict[str, float]:
    """Mean rise of cross-entropy by way, over SAEs and seeds that all ways can halve."""
    cases = _rises_of_all_ways(rows)
    return {way: mean(rises[way] for rises in cases) for way in WAYS} if cases else {}


def _rises_of_all_ways(rows: Sequence[Row]) -> list[dict[str, float]]:
    cases: dict[tuple[Any, str], dict[str, float]] = {}
    for row in rows:
        if row["ce_rise"] is not None:
            case = cases.setdefault((row.get("seed"), row["sae"]), {})
            case[row["way"]] = row["ce_rise"]
    return [case for case in cases.values() if len(case) == len(WAYS)]
