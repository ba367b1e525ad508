"""A study's report: one self-contained HTML page, and its tables for the terminal."""

import base64
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_sae.files import write_atomically
from lightning_sae.studies.shared.folder import write_csv, write_json
from lightning_sae.studies.shared.rows import Row, known, with_spread

Compared = tuple[str, str, str]
"""The quantity compared, the document's value, and this study's value."""

POOR = 0.5
"""FVU above which an SAE loses more than half of the variance."""

BLANK = {"", "-", "none", "nan"}


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        headings: Headings of all columns.
        rows: Cells; the first of each row is its name.
        note: Explanation of the columns.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def says_something(self) -> bool:
        """Whether any cell after the names has a figure."""
        return any(cell not in BLANK for row in self.rows for cell in row[1:] or row)

    def lines(self) -> Iterator[str]:
        """The table for the terminal."""
        cells = [list(self.headings), *(list(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for first, *others in cells:
            figures = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
            yield "  ".join([first.ljust(widths[0]), *figures]).rstrip()


def figures_table(
    groups: Mapping[str, Sequence[Row]],
    columns: Mapping[str, tuple[str, str]],
    note: str = "",
    none: str = "",
) -> Table:
    """A table of figures, mean ± standard deviation over the rows of each group.

    Args:
        groups: Rows by the name of their line.
        columns: Heading and format of each figure.
        note: Explanation of the columns.
        none: Text where no row of a group has the figure.
    """
    lines = [
        [name, *(with_spread(known(rows, key), form, none) for key, (_, form) in columns.items())]
        for name, rows in groups.items()
    ]
    return Table(["", *(heading for heading, _ in columns.values())], lines, note)


def caution(groups: Mapping[str, Sequence[Row]]) -> str:
    """A warning that names the SAEs whose mean FVU is above `POOR`; empty if there are none.

    Args:
        groups: Rows with `fvu` by the name of an SAE.

    Example:
        >>> caution({"a": [{"fvu": 0.3}], "b": [{"fvu": 0.5}, {"fvu": 0.7}]})[:37]
        'Caution: FVU is above 0.5 for b (0.60'
    """
    found = {name: known(rows, "fvu") for name, rows in groups.items()}
    poor = {name: mean(values) for name, values in found.items() if values}
    named = [f"{name} ({value:.2f})" for name, value in poor.items() if not value <= POOR]
    if not named:
        return ""
    return (
        f"Caution: FVU is above {POOR:g} for {', '.join(named)}. Such an SAE misses more than half "
        "of the variance of the activations: its latents say little about the model. "
        "Train for longer, or with a weaker penalty."
    )


@dataclass(frozen=True)
class Section:
    """A result in words, tables and plots.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        tables: Tables; those without a figure are not shown.
        pictures: Image files, each with its caption.
        details: Collapsible sections; not shown in the terminal.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Mapping[Path, str] = field(default_factory=dict)
    details: Sequence["Section"] = ()

    def shown(self) -> list[Table]:
        """The tables that have figures."""
        return [table for table in self.tables if table.says_something()]


@dataclass(frozen=True)
class Page:
    """The question, method and results of a study, and the values that its source reports.

    Attributes:
        title: Name of the study.
        question: Its question.
        method: Its method, in paragraphs.
        settings: Values by name.
        sections: Results.
        comparison: The document's statements beside the results.
        source: The document, if there is one.
        results: Plain values for `results.json`.
        csv: Rows of CSV files by name.
        caution: Warning shown before all figures; see `caution`.
    """

    title: str
    question: str
    method: Sequence[str]
    settings: Mapping[str, Any]
    sections: Sequence[Section]
    comparison: Sequence[Compared] = ()
    source: str = ""
    results: Any = None
    csv: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    caution: str = ""

    def lines(self) -> Iterator[str]:
        """Caution, tables and comparison for the terminal."""
        if self.caution:
            yield f"\n{self.caution}"
        for section in self.sections:
            for table in section.shown():
                yield f"\n{section.title}"
                yield from table.lines()
        if self.comparison:
            yield "\nThe document, and here"
            for what, there, here in self.comparison:
                yield f"  {what}: {there} | {here}"

    def write(self, path: Path) -> Path:
        """Write the page with all images embedded."""
        environment = Environment(
            loader=PackageLoader("lightning_sae.studies.shared", "."),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        environment.filters["embedded"] = _embedded
        text = environment.get_template("page.html.jinja").render(page=self)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def publish(page: Page, folder: Path, of: str) -> None:
    """Write a page and its results, print its tables, and list the files that were made.

    Args:
        page: For `report.html`, `results.json` and CSV files.
        folder: The study's folder.
        of: End of the last line: how much was trained, or how long it took.
    """
    made = [write_json(folder / "results.json", page.results)]
    made += [write_csv(folder / f"{name}.csv", rows) for name, rows in page.csv.items()]
    made += [picture for section in page.sections for picture in section.pictures]
    made += [page.write(folder / "report.html")]
    last = f"Made: {', '.join(map(str, made))}, {of}."
    sys.stdout.write("\n".join([*page.lines(), "", last]) + "\n")
