"""Format figures as text: numbers, verdicts on targets, and tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.libraries.base import OURS

Row = dict[str, Any]


def name(row: Row) -> str:
    """The library's name, with the variant if there is one."""
    return f"{row['library']}, {row['variant']}" if row["variant"] else str(row["library"])


def trouble(row: Row) -> str:
    """The cell of a measurement that failed."""
    return f"failed: {row['error']}"


def median(row: Row) -> float | None:
    """Median seconds of a step, None if the measurement failed."""
    return row["seconds"]["median"] if "seconds" in row else None


def milliseconds(row: Row) -> str:
    """Median and quartiles in milliseconds."""
    if "seconds" not in row:
        return trouble(row)
    low, middle, high = (1000 * row["seconds"][key] for key in ("low", "median", "high"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def seconds(row: Row) -> str:
    """Median in seconds."""
    found = median(row)
    return trouble(row) if found is None else f"{found:.3g}"


def rate(row: Row) -> str:
    """Activations per second."""
    return f"{row['rate']:,.0f}" if "rate" in row else trouble(row)


def quotient(one: float | None, other: float | None) -> str:
    """`one / other`, or nothing if either is missing or zero.

    Example:
        >>> quotient(3.0, 2.0), quotient(None, 2.0)
        ('1.50', '')
    """
    return f"{one / other:.2f}" if one and other else ""


def ours(rows: Iterable[Row]) -> Row | None:
    """The row of lightning-sae without a variant, if its measurement succeeded."""
    mine = (row for row in rows if row["library"] == OURS and not row["variant"])
    return next((row for row in mine if "error" not in row), None)


def peers(rows: Iterable[Row]) -> list[Row]:
    """The rows of other libraries whose measurement succeeded."""
    others = (row for row in rows if row["library"] != OURS)
    return [row for row in others if "error" not in row]


def at_least(what: str, value: float, target: float | None) -> str:
    """A figure that should be large, with its target.

    Example:
        >>> at_least("Time of a peer over ours", 4.5, 5.0)
        '- Time of a peer over ours: 4.50; target at least 5: missed.'
    """
    if target is None:
        return f"- {what}: {value:.2f}."
    verdict = "reached" if value >= target else "missed"
    return f"- {what}: {value:.2f}; target at least {target:g}: {verdict}."


def at_most(what: str, value: float, target: float) -> str:
    """A figure that should be small, with its target."""
    verdict = "reached" if value <= target else "missed"
    return f"- {what}: {value:.2f}; target at most {target:g}: {verdict}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown.

    Example:
        >>> table(["", "ms"], [["ours", "2"]])
        ['|  | ms |', '| --- | ---: |', '| ours | 2 |']
    """
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *escaped)]
