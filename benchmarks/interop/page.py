"""The results as Markdown, between two marks in docs/interop.md."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.interop.compare import Row

START, END = "<!-- results of make interop -->", "<!-- end of results -->"


def page(path: Path, results: dict[str, Any]) -> None:
    """Put the tables in the place of those that the page has; a new page gets them alone."""
    text = path.read_text() if path.exists() else "# Other libraries\n"
    if START not in text:
        text += f"\n{START}\n{END}\n"
    before, rest = text.split(START)
    after = rest.split(END)[1]
    path.write_text(f"{before}{START}\n\n{_body(results)}\n\n{END}{after}")


def _body(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    sections: dict[str, Callable[[Any], str]] = {
        "out": partial(_section, "Trained here, read by their libraries"),
        "in": partial(_section, "Trained and saved by their libraries, read here"),
        "saebench": _saebench,
        "splicing": _splicing,
    }
    return "\n\n".join(
        [
            f"Measured by `make interop` with {versions}, on {results['rows']:,} activations of "
            "the embedded language model that no SAE was trained on. Differences are shares of "
            "the largest latent and of the largest activation; *sets* counts latents that are "
            "zero on one side alone.",
            *(write(results[part]) for part, write in sections.items() if part in results),
        ]
    )


def _section(title: str, found: Sequence[dict[str, Any]]) -> str:
    rows = [Row(**row) for row in found]
    same = sum(row.verdict == "same" for row in rows)
    refused = [row for row in rows if row.verdict == "refused"]
    different = len(rows) - same - len(refused)
    parts = [
        f"### {title}",
        f"{same} the same to 1e-5 with the same active sets, {different} different, "
        f"{len(refused)} refused.",
        _table([row for row in rows if row.verdict != "refused"]),
    ]
    if refused:
        parts += ["Refused, with the reason that the user gets:", "\n".join(_reasons(refused))]
    return "\n\n".join(parts)


def _reasons(refused: Sequence[Row]) -> list[str]:
    """A line for each reason, and the SAEs that it was given for."""
    saes: dict[tuple[str, str], list[str]] = {}
    for row in refused:
        reason = re.sub(r"\S*/tmp\S*/", "", row.note)
        saes.setdefault((row.library, reason), []).append(row.sae)
    return [
        f"- {library}: {reason} ({'; '.join(names)})" for (library, reason), names in saes.items()
    ]


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| library | SAE | L0 | latents | sets | reconstruction | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row.library} | {row.sae} | {row.l0:.1f} | {row.latents:.1e} | {row.sets} | "
        f"{row.reconstruction:.1e} | {row.verdict}{'; ' if row.note else ''}{row.note} |"
        for row in rows
    ]
    return "\n".join(lines)


def _saebench(found: dict[str, Any]) -> str:
    head = "### SAEBench\n\n"
    if "stops_at" in found:
        return f"{head}It stopped at: `{found['stops_at']}`"
    rows = [f"| {name} | {_shown(value)} |" for name, value in found.items()]
    return (
        f"{head}Its checks of a custom SAE and its core evaluation, on `for_saebench(sae)` and the "
        "embedded model:\n\n| | |\n| --- | --- |\n" + "\n".join(rows)
    )


def _splicing(found: dict[str, Any]) -> str:
    return (
        f"### Splicing\n\nThe three lines of [splicing.md](splicing.md) in TransformerLens "
        f"{found['transformer_lens']}: logits differ from those of this package's own splicing by "
        f"{found['difference']:.1e} of the largest."
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
