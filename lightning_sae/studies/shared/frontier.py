"""Distances between curves against L0, within the range measured for both.

A curve is measured at a few L0 and interpolated linearly over log L0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Range = tuple[float, float]

N_LEVELS = 400  # number of levels at which L0 is compared: gives the mean to 1e-4 on smooth curves


@dataclass(frozen=True)
class Curve:
    """A figure against L0.

    Args:
        points: L0, which is positive, and the figure; at least two of them.

    Attributes:
        log_l0: Natural logarithms of L0, in increasing order.
        values: The figure at each.
    """

    log_l0: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Curve | None":
        """The curve through points in any order; None if fewer than two have an L0 above 0."""
        known = sorted((math.log(l0), value) for l0, value in points if l0 > 0)
        if len(known) < 2:
            return None
        log_l0, values = zip(*known, strict=True)
        return cls(log_l0, values)

    def at(self, log_l0: float) -> float:
        """The figure at an L0 between the smallest and the largest."""
        return float(np.interp(log_l0, self.log_l0, self.values))

    def log_l0_at(self, level: float) -> float | None:
        """Logarithm of the smallest L0 where an increasing figure reaches `level`; None outside."""
        if level < self.values[0]:
            return None
        if level == self.values[0]:
            return self.log_l0[0]
        for (left, low), (right, high) in pairwise(zip(self.log_l0, self.values, strict=True)):
            if low < level <= high:
                return left + (right - left) * (level - low) / (high - low)
        return None


def common_l0(curves: Sequence[Curve]) -> Range | None:
    """The range of log L0 covered by all curves; None if it is empty."""
    low = max(curve.log_l0[0] for curve in curves)
    high = min(curve.log_l0[-1] for curve in curves)
    return (low, high) if low < high else None


def mean_over(curve: Curve, within: Range) -> float:
    """Mean of the figure over log L0, exact for the polyline.

    Example:
        >>> curve = Curve((0.0, 2.0), (1.0, 3.0))
        >>> mean_over(curve, (0.0, 1.0))
        1.5
    """
    knots = _knots([curve], within)
    areas = ((b - a) * (curve.at(a) + curve.at(b)) / 2 for a, b in pairwise(knots))
    return sum(areas) / (within[1] - within[0])


def mean_over_common(curve: Curve, other: Curve) -> float | None:
    """Mean of `curve` over the common range of log L0; None if it is empty."""
    within = common_l0([curve, other])
    return None if within is None else mean_over(curve, within)


def gap(curve: Curve, baseline: Curve, part: float = 1.0) -> float | None:
    """Mean of `curve` minus `baseline` over the lower part of the common range of log L0.

    None if no L0 is common to both.
    """
    within = common_l0([curve, baseline])
    if within is None:
        return None
    lower = (within[0], within[0] + part * (within[1] - within[0]))
    return mean_over(curve, lower) - mean_over(baseline, lower)


def gap_at_low_l0(curve: Curve, baseline: Curve) -> float | None:
    """`gap` over the lower half."""
    return gap(curve, baseline, part=0.5)


def area_between(curve: Curve, baseline: Curve) -> float | None:
    """Integral of `curve` minus `baseline` over the common range of log L0.

    It is `gap` times the number of e-folds of L0; None if no L0 is common to both.
    """
    within, mean_gap = common_l0([curve, baseline]), gap(curve, baseline)
    return None if within is None or mean_gap is None else (within[1] - within[0]) * mean_gap


def share_below(curve: Curve, baseline: Curve) -> float | None:
    """Share of the common range of log L0 on which `curve` is less than `baseline`."""
    within = common_l0([curve, baseline])
    if within is None:
        return None
    below = 0.0
    for a, b in pairwise(_knots([curve, baseline], within)):
        below += (b - a) * _negative(curve.at(a) - baseline.at(a), curve.at(b) - baseline.at(b))
    return below / (within[1] - within[0])


def _negative(first: float, last: float) -> float:
    """Share of a straight line from `first` to `last` that is below zero."""
    if first * last >= 0:  # it does not cross
        return float(first + last < 0)
    return min(first, last) / (min(first, last) - max(first, last))


def _knots(curves: Sequence[Curve], within: Range) -> list[float]:
    low, high = within
    inside = {x for curve in curves for x in curve.log_l0 if low < x < high}
    return sorted({low, high} | inside)


def common_levels(curves: Sequence[Curve]) -> Range | None:
    """The range of levels that all curves of an increasing figure reach; None if it is empty.

    Levels below that of a curve's smallest L0 are excluded, because they were not measured.
    """
    low = max(curve.values[0] for curve in curves)
    high = min(max(curve.values) for curve in curves)
    return (low, high) if low < high else None


def l0_ratio(curve: Curve, baseline: Curve) -> float | None:
    """Ratio of the L0 of `curve` and `baseline` at equal levels of an increasing figure.

    It is the geometric mean over all levels that both reach; None if there are none.

    Example:
        >>> baseline = Curve((0.0, 2.0), (0.0, 1.0))
        >>> half = Curve((-math.log(2), 2 - math.log(2)), (0.0, 1.0))
        >>> round(l0_ratio(half, baseline), 6)
        0.5
    """
    levels = common_levels([curve, baseline])
    if levels is None:
        return None
    low, high = levels
    total = 0.0
    for i in range(N_LEVELS):
        level = low + (high - low) * (i + 0.5) / N_LEVELS
        ours, theirs = curve.log_l0_at(level), baseline.log_l0_at(level)
        assert ours is not None and theirs is not None  # as both reach it  # noqa: PT018
        total += ours - theirs
    return math.exp(total / N_LEVELS)
