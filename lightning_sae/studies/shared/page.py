"""A study's report: one HTML page that needs no other file, and its tables for the terminal."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_sae.files import write_atomically


@dataclass(frozen=True)
class Table:
    """Rows of a table, the first column their names.

    Attributes:
        headings: Of all columns.
        rows: Texts.
        note: What a reader has to know of the columns.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def lines(self) -> Iterator[str]:
        """The table for the terminal."""
        cells = [list(self.headings), *(list(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for first, *others in cells:
            figures = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
            yield "  ".join([first.ljust(widths[0]), *figures]).rstrip()


@dataclass(frozen=True)
class Section:
    """A result: what is seen, in words, tables and pictures.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        tables: Tables.
        pictures: Files, with a line on what each shows.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """What a study asked, how, what came out, and how that compares with its source.

    Attributes:
        title: The study.
        question: What it asks.
        method: How, in paragraphs.
        settings: Names and values.
        sections: Results.
        comparison: What the document says and what is seen here: rows of three texts.
        source: The document.
    """

    title: str
    question: str
    method: Sequence[str]
    settings: Mapping[str, Any]
    sections: Sequence[Section]
    comparison: Sequence[tuple[str, str, str]]
    source: str

    def lines(self) -> Iterator[str]:
        """Results and comparison for the terminal."""
        for section in self.sections:
            for table in section.tables:
                yield f"\n{section.title}"
                yield from table.lines()
        if self.comparison:
            yield "\nThe document, and here"
            for what, there, here in self.comparison:
                yield f"  {what}: {there} | {here}"

    def write(self, path: Path) -> Path:
        """Write the page, with all pictures in it."""
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


def with_spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation of a sample, as text; the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ± {stdev(values):{form.lstrip('+')}}"
