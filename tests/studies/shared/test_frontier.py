"""Comparisons of curves, on curves whose distances are known."""

import math

import pytest

from lightning_sae.studies.shared.frontier import (
    Curve,
    area_between,
    common_l0,
    common_levels,
    l0_ratio,
    mean_over,
    share_below,
)

E = math.e


def curve(*points: tuple[float, float]) -> Curve:
    """Points with L0 as powers of e."""
    found = Curve.of([(math.exp(x), y) for x, y in points])
    assert found is not None
    return found


def test_points_come_in_any_order_and_those_without_latents_are_left_out() -> None:
    found = Curve.of([(E**2, 1.0), (0.0, 9.0), (1.0, 3.0), (E, 2.0)])
    assert found is not None
    assert found.log_l0 == pytest.approx((0, 1, 2))
    assert found.values == (3.0, 2.0, 1.0)
    assert Curve.of([(0.0, 1.0), (5.0, 1.0)]) is None
    assert Curve.of([]) is None


def test_between_points_a_figure_is_straight_over_log_l0() -> None:
    assert curve((0, 1), (2, 5)).at(0.5) == pytest.approx(2)
    assert curve((0, 1), (2, 5), (3, 5)).at(2.5) == pytest.approx(5)


def test_the_mean_is_that_of_a_fine_sum() -> None:
    polyline = curve((0, 1), (1, 4), (3, -2), (4, 0))
    low, high, n = 0.3, 3.6, 100_000
    naive = sum(polyline.at(low + (high - low) * (i + 0.5) / n) for i in range(n)) / n
    assert mean_over(polyline, (low, high)) == pytest.approx(naive, abs=1e-6)


def test_the_area_is_over_the_common_range_alone() -> None:
    upper, lower = curve((0, 3), (4, 3)), curve((1, 1), (6, 1))
    assert common_l0([upper, lower]) == pytest.approx((1, 4))
    assert area_between(lower, upper) == pytest.approx(3 * -2)
    assert area_between(upper, lower) == pytest.approx(3 * 2)
    triangle = curve((1, 3), (4, 0))
    assert area_between(triangle, upper) == pytest.approx(-3 * 3 / 2)


def test_curves_without_a_common_l0_are_not_compared() -> None:
    left, right = curve((0, 0), (1, 1)), curve((2, 0), (3, 1))
    assert common_l0([left, right]) is None
    assert area_between(left, right) is None
    assert share_below(left, right) is None
    touching = curve((1, 0), (2, 1))
    assert common_l0([left, touching]) is None


def test_the_share_below_ends_where_the_curves_cross() -> None:
    flat, rising = curve((0, 1), (4, 1)), curve((0, 0), (4, 4))
    assert share_below(rising, flat) == pytest.approx(1 / 4)
    assert share_below(flat, rising) == pytest.approx(3 / 4)
    assert share_below(flat, flat) == 0
    assert share_below(curve((0, 0), (4, 1)), flat) == 1
    zigzag = curve((0, 0), (1, 2), (2, 0), (4, 0))
    assert share_below(zigzag, flat) == pytest.approx((0.5 + 0.5 + 2) / 4)


def test_a_shift_over_log_l0_is_the_ratio_at_every_level() -> None:
    points = [(0.0, 0.1), (1.0, 0.5), (1.5, 0.8), (3.0, 0.9)]
    baseline = curve(*points)
    shifted = curve(*((x + math.log(0.4), y) for x, y in points))
    assert l0_ratio(shifted, baseline) == pytest.approx(0.4)
    assert l0_ratio(baseline, shifted) == pytest.approx(1 / 0.4)
    assert l0_ratio(baseline, baseline) == pytest.approx(1)


def test_the_ratio_is_a_geometric_mean_over_common_levels() -> None:
    baseline, steep = curve((0, 0), (2, 2)), curve((0, 0), (1, 2))
    assert common_levels([steep, baseline]) == (0, 2)
    # At level y they need e^(y / 2) and e^y: the mean difference of logarithms is -1/2.
    assert l0_ratio(steep, baseline) == pytest.approx(math.exp(-0.5))
    partly = curve((3, 1), (4, 5))  # levels 1 to 2 are common: logs differ by 3 + (y - 1) / 4 - y
    assert l0_ratio(partly, baseline) == pytest.approx(math.exp(3 + 0.125 - 1.5))


def test_a_level_needs_the_least_l0_that_reaches_it() -> None:
    bumpy = curve((0, 0), (1, 2), (2, 1), (3, 3))
    assert bumpy.log_l0_at(0) == 0
    assert bumpy.log_l0_at(1.5) == pytest.approx(0.75)
    assert bumpy.log_l0_at(2.5) == pytest.approx(2.75)
    assert bumpy.log_l0_at(3) == pytest.approx(3)


def test_levels_that_are_not_reached_are_not_extrapolated() -> None:
    rising = curve((0, 1), (1, 2))
    assert rising.log_l0_at(0.9) is None
    assert rising.log_l0_at(2.1) is None
    # Below its least L0 it may have reached that level, or not.
    assert curve((0, 3), (1, 1), (2, 4)).log_l0_at(2) is None
    assert common_levels([rising, curve((0, 3), (1, 4))]) is None
    assert l0_ratio(rising, curve((0, 3), (1, 4))) is None
