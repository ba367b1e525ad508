"""Measure and write the page: `python -m benchmarks [SECTION ...]`, by default all sections."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks import quality
from benchmarks.command_line import add_option, say
from benchmarks.language_model_source import Source, absolute, layer_of
from benchmarks.libraries.base import LIBRARIES
from benchmarks.machine import surroundings
from benchmarks.plot import draw
from benchmarks.report import page
from benchmarks.sections import SECTIONS, Plan

CHOICES = [*SECTIONS, "report", "all"]
PLANNED = {field.name for field in fields(Plan)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the given sections one after another, and write the page after each."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["quality"]:  # with options and a page of its own
        quality.main(words[1:])
        return
    asked = parser().parse_args(arguments)
    plan, sections = plan_of(asked), sections_of(asked.sections)
    output = Path(asked.output).with_suffix(".json")
    output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    about = {"surroundings": surroundings(plan.threads, "benchmarks"), "plan": asdict(plan)}
    for name in sections:
        results[name] = about | SECTIONS[name](plan)
        write(results, output)
    write(results, output)
    say(f"Wrote {output.with_suffix('.md')}, {output.name} and, with matplotlib, the picture.")


def write(results: dict[str, Any], output: Path) -> None:
    """Write the figures, the page and the plot."""
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(results))
    if "growth" in results:
        draw(results["growth"], output.with_suffix(".png"))


def parser() -> argparse.ArgumentParser:
    """The command line; every size is an option."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    found.add_argument(
        "sections", nargs="*", metavar="SECTION", help=", ".join(CHOICES) + "; or quality"
    )
    found.add_argument("--output", default="docs/benchmark", help="path of the page, less .md")
    found.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    found.add_argument("--model", default="embedded", help="a transformers folder")
    found.add_argument("--text", default="embedded", help="a text file")
    found.add_argument(
        "--hook", default="blocks.2.hook_resid_post", help="blocks.N.hook_resid_post"
    )
    for field in fields(Plan):
        if field.name not in ("libraries", "source"):
            add_option(found, field.name, field.default)
    return found


def plan_of(asked: argparse.Namespace) -> Plan:
    """The plan that the command line describes."""
    source = Source(absolute(asked.model), absolute(asked.text), layer_of(asked.hook))
    options = {name: value for name, value in vars(asked).items() if name in PLANNED}
    several = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    return Plan(**options | several | {"source": source._asdict()})


def sections_of(names: Sequence[str]) -> list[str]:
    """The sections that the command line names.

    Raises:
        ValueError: If there is no section of a name.
    """
    for name in names:
        if name not in CHOICES:
            raise ValueError(f"Expected a section of {', '.join(CHOICES)} but got {name}.")
    if not names or "all" in names:
        return list(SECTIONS)
    return [name for name in names if name != "report"]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
