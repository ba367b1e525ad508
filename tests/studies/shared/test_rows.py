"""Rows: which are chosen, and their figures as text."""

import math

from lightning_sae.studies.shared.rows import (
    distinct,
    known,
    select,
    spread,
    with_spread,
    without_nan,
)

ROWS = [
    {"sae": "b", "seed": 0, "l0": 3.0},
    {"sae": "a", "seed": 0, "l0": None},
    {"sae": "b", "seed": 1, "l0": 5.0},
    {"sae": "a", "seed": 1},
]


def test_rows_are_chosen_by_all_of_the_values() -> None:
    assert select(ROWS, sae="b") == [ROWS[0], ROWS[2]]
    assert select(ROWS, sae="a", seed=1) == [ROWS[3]]
    assert select(ROWS, sae="c") == []
    assert select(ROWS) == ROWS


def test_values_keep_their_order_and_missing_figures_are_left_out() -> None:
    assert distinct(ROWS, "sae") == ["b", "a"]
    assert known(ROWS, "l0") == [3.0, 5.0]


def test_mean_and_spread_are_those_of_a_sample() -> None:
    assert with_spread([1.0, 3.0], ".2f") == "2.00 ± 1.41"
    assert with_spread([-1.0, -3.0], "+.1f") == "-2.0 ± 1.4"
    assert with_spread([2.0]) == "2.000"
    assert (with_spread([]), with_spread([], none="diverged")) == ("", "diverged")
    assert (spread([7.0]), spread([1.0, 3.0])) == (0.0, 2**0.5)


def test_figures_that_are_not_there_are_null_in_json() -> None:
    found = without_nan({"a": math.nan, "b": {"c": 1.0, "d": [True]}})
    assert found == {"a": None, "b": {"c": 1.0, "d": [True]}}
