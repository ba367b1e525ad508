"""Rows of tables: choosing them, and their figures as text."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
"""Plain values by column."""


def select(rows: Sequence[Row], **values: Any) -> list[Row]:
    """The rows that have these values.

    Example:
        >>> select([{"sae": "a", "l0": 3}, {"sae": "b", "l0": 4}], sae="b")
        [{'sae': 'b', 'l0': 4}]
    """
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def distinct(rows: Sequence[Row], column: str) -> list[Any]:
    """The different values of a column, in the order in which they first appear."""
    return list(dict.fromkeys(row[column] for row in rows))


def without_nan(figures: Any) -> Any:
    """Figures with None in place of NaN, which JSON does not have."""
    if isinstance(figures, dict):
        return {name: without_nan(value) for name, value in figures.items()}
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def known(rows: Sequence[Row], column: str) -> list[float]:
    """The figures of a column, without rows where it is missing or None."""
    return [row[column] for row in rows if row.get(column) is not None]


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], form: str = ".3f", none: str = "") -> str:
    """Mean ± standard deviation as text; a single value alone, and `none` without values.

    Example:
        >>> with_spread([1.0, 3.0], ".2f"), with_spread([2.0]), with_spread([], none="diverged")
        ('2.00 ± 1.41', '2.000', 'diverged')
    """
    if not values:
        return none
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ± {stdev(values):{form.lstrip('+')}}"
