"""Compare reconstruction with other libraries at the same L0: `python -m benchmarks quality`.

All train on the same saved activations of a language model: with their own defaults, with one
recipe at one learning rate, and with that recipe at the best of several, with the best of the
library's arguments on decoder norms.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import say
from benchmarks.formatting import Row, table
from benchmarks.language_model_source import absolute
from benchmarks.libraries.base import OURS
from benchmarks.machine import surroundings
from benchmarks.measure import run_process
from benchmarks.quality_worker import (
    ATTEMPTS,
    CLASSES,
    CLOSE,
    CLOSEST,
    FROM_ONE,
    MOST_ATTEMPTS,
    NEAR,
    TRAINERS,
    VARIANTS,
    save_activations,
)
from lightning_sae import ActivationDataModule

TITLES = {
    "relu": "ReLU, L1",
    "gated": "Gated",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
}
SETTINGS = {
    "defaults": "Each library's defaults",
    "recipe": "One recipe, one learning rate",
    "rates": "One recipe, each its best learning rate and norms",
}
PLAN = ("hook", "latents", "l0", "steps", "batch_size", "seeds")
HELD_OUT = 32768


def main(arguments: Sequence[str] | None = None) -> None:
    """Save activations, train all libraries on them one after another, write the page."""
    asked = parser().parse_args(arguments)
    output = Path(asked.output).with_suffix(".json")
    output.parent.mkdir(parents=True, exist_ok=True)
    about = surroundings(asked.threads, "benchmarks")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.safetensors"
        counts = save_activations(path, _stream(asked), asked.steps * asked.batch_size, HELD_OUT)
        rows = _measured(asked, path)
    results: Row = json.loads(output.read_text()) if output.exists() else {}
    plan = {name: vars(asked)[name] for name in PLAN}
    results[asked.name] = merged(results.get(asked.name), about, plan, counts, rows)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(results))
    say(f"Wrote {output.with_suffix('.md')} and {output}.")


def merged(before: Row | None, about: Row, plan: Row, counts: Row, rows: list[Row]) -> Row:
    """The part of a model: new rows replace those that they repeat, others of its plan stay."""
    kept: list[Row] = []
    commands = [f"{about['command']}, {about['date']}, with {about['compared']}, {about['with']}"]
    if before is not None and before["plan"] == plan:
        again = {_key(row) for row in rows}
        kept = [row for row in before["rows"] if _key(row) not in again]
        commands = [*before["commands"], *commands] if kept else commands
    return {"commands": commands, "plan": plan, "activations": counts, "rows": [*kept, *rows]}


def _key(row: Row) -> tuple[str, str, str]:
    return row["setting"], row["library"], row["architecture"]


def parser() -> argparse.ArgumentParser:
    """The command line; every size is an option."""
    found = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    found.add_argument("--name", default="embedded", help="of the language model, on the page")
    found.add_argument("--model", default="embedded", help="a transformers folder")
    found.add_argument("--text", default="embedded", help="a text file")
    found.add_argument("--hook", default="blocks.2.hook_resid_post", help="%(default)s")
    found.add_argument("--output", default="docs/quality", help="path of the page, less .md")
    found.add_argument("--libraries", nargs="+", choices=[*TRAINERS], default=[*TRAINERS])
    found.add_argument("--architectures", nargs="+", choices=[*CLASSES], default=[*CLASSES])
    found.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    found.add_argument("--rate", type=float, default=2e-3, help="of the recipe (%(default)s)")
    found.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[4e-3, 8e-3, 1.6e-2, 3.2e-2],
        help="learning rates of the recipe to choose from (%(default)s)",
    )
    sizes = {
        "latents": 512,
        "l0": 16,
        "steps": 500,
        "batch-size": 512,
        "seeds": 2,
        "threads": 1,
        "timeout": 3600,
    }
    for name, default in sizes.items():
        found.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    return found


def _stream(asked: argparse.Namespace) -> ActivationDataModule:
    return ActivationDataModule(
        asked.hook,
        absolute(asked.model),
        text=absolute(asked.text),
        batch_size=asked.batch_size,
    )


def _measured(asked: argparse.Namespace, path: Path) -> list[Row]:
    """Figures of all libraries, settings, architectures and seeds."""
    found: list[Row] = []
    rates = {"defaults": [None], "recipe": [asked.rate], "rates": asked.rates}
    for setting in asked.settings:
        for library in asked.libraries:
            if library == FROM_ONE and setting != "recipe":
                continue
            say(f"{asked.name}: {library}, {SETTINGS[setting]}")
            more: Row = {}
            if setting == "rates":
                more = {"variants": [*VARIANTS.get(library, ("",))], "exact": True}
            for row in _of_process(asked, str(path), library, rates=rates[setting], **more):
                say(f"    {outline(row)}")
                found.append({"setting": setting, **row})
    return found


def _of_process(asked: argparse.Namespace, path: str, library: str, **more: Any) -> list[Row]:
    call = {
        "library": library,
        "path": path,
        "d_sae": asked.latents,
        "l0": asked.l0,
        "batch_size": asked.batch_size,
        "architectures": asked.architectures,
        "seeds": asked.seeds,
        "threads": asked.threads,
        **more,
    }
    command = [sys.executable, "-m", "benchmarks.quality_worker", json.dumps(call)]
    answer: Any = run_process(command, asked.threads, asked.timeout)
    if isinstance(answer, dict):  # it failed as a whole
        return [{"library": library, "architecture": a, **answer} for a in asked.architectures]
    return [{key: value for key, value in row.items() if key != "path"} for row in answer]


def outline(row: Row) -> str:
    """A short summary of a training."""
    if "error" in row:
        return f"{row['architecture']} failed: {row['error']}"
    return f"{row['architecture']}: L0 {row['l0']:.1f}, FVU {row['fvu']:.4f}"


# The page.


def page(results: Row) -> str:
    """The page in Markdown."""
    lines = [
        "# Quality beside other libraries",
        "",
        "All libraries train by their own trainers on the same saved activations of a language",
        "model, with the same seeds, batches and number of steps, and are evaluated by one formula",
        "on the activations that follow in the stream of text. FVU is the squared error over the",
        "variance.",
        "",
        "- **Defaults**: everything is as the library has it, but what sets L0.",
        "  dictionary_learning's warm-ups are 5 % and 10 % of the run, because its own are longer",
        "  than the run and it refuses them.",
        "- **One recipe**: the learning rate is warmed up over 5 % and decayed over the last 25 %",
        "  of the run, a penalty is warmed up over 10 %, and latents are dead after 10 % of the",
        "  run.",
        "- **Each its best learning rate and norms**: each library and architecture has that rate,",
        "  of those named, and those norms of decoder rows, which are best with the first seed:",
        "  `decoder_norm` of ours `unit` or `free` (gated SAEs `auxiliary_decoder=live` then),",
        "  free rows with `decoder_init_norm` 1 or 0.1; this argument of SAELens 0.1 or 1, too.",
        "  dictionary_learning has no such argument.",
        f"- **{FROM_ONE}**: with one change, `decoder_init_norm=1`, which is 0.1 by default.",
        "- **L0**: `k`, `target_l0` (ours), or the library's own target (JumpReLU; SAELens' mode",
        "  `quadratic`). Where others have only a coefficient (ReLU, gated), it is searched with",
        f"  the first seed in up to {ATTEMPTS} trainings until L0 is within {CLOSE:.0%}, and the",
        f"  closest counts. In the last table there are up to {MOST_ATTEMPTS}, until L0 is within",
        f"  {CLOSEST:.0%}, and `target_l0` of ours is searched too: one % of L0 is worth about",
        "  half a % of FVU.",
        "- **Units**: activations are scaled to the norm that each library would scale them to.",
        "- **BatchTopK and Matryoshka**: the others select per batch of 1,024 also in the",
        "  evaluation, so that their L0 is exact; ours uses its threshold, as in use.",
        "- **Matryoshka**: widths 1/16 to 1/1 of the latents, which the others want given; with",
        "  its defaults ours draws five prefixes at random.",
        "",
        "Runs are short. Default learning rates of the others are meant for longer ones, and so",
        "are their thresholds of JumpReLU, which L0 far from the target shows: there FVU says",
        "nothing.",
        "",
        "One learning rate is not the same for all. A step of Adam moves each weight by about",
        "the learning rate, whatever its size. SAELens starts the rows of the decoder and of",
        "the encoder at norm 0.1, and the same rate turns them faster than rows of norm 1, with",
        "which ours start. The column with `decoder_init_norm=1` shows what that is worth: for",
        "TopK and BatchTopK SAEs it is all of the difference. So the last table of each model",
        "gives every library its own rate. Where that column is ahead of ours, as of ReLU SAEs,",
        "two more things differ. SAELens leaves decoder norms free and weights a penalty by",
        "them, as ours does with `decoder_norm: free`; `docs/settings.md` shows what that",
        "changes. And the coefficient of a penalty is the final one as soon as it is warmed up,",
        "known from earlier trainings, where `target_l0` finds it in the run.",
        "",
        "Figures are means over seeds, ± half the range. In **bold**: the least FVU among",
        f"those whose L0 is within {NEAR:.0%} of the target.",
    ]
    for name, part in results.items():
        lines += ["", *_of_model(name, part)]
    return "\n".join(lines) + "\n"


def _of_model(name: str, part: Row) -> list[str]:
    plan, counts = part["plan"], part["activations"]
    lines = [
        f"## {name}, `{plan['hook']}`",
        "",
        f"{plan['latents']} latents on {counts['d_in']} dimensions, L0 {plan['l0']}, "
        f"{plan['steps']} steps of {plan['batch_size']} activations, {plan['seeds']} seeds; "
        f"{counts['n_held_out']:,} held-out activations.",
        *(f"Made by {command}." for command in part["commands"]),
    ]
    for setting, title in SETTINGS.items():
        rows = [row for row in part["rows"] if row["setting"] == setting]
        if rows:
            lines += ["", f"### {title}", "", *_rates(rows), *_table(rows, plan["l0"])]
    return lines


def _rates(rows: Sequence[Row]) -> list[str]:
    """Which learning rates were tried."""
    titles = {title.split(",")[0] for row in rows for title in row.get("tried", {})}
    tried = sorted(float(rate) for rate in titles if rate != "None")
    return [f"Learning rate {' or '.join(f'{rate:g}' for rate in tried)}.", ""] if tried else []


def _table(rows: Sequence[Row], l0: int) -> list[str]:
    libraries = [name for name in TRAINERS if any(row["library"] == name for row in rows)]
    titles = ["ours" if name == OURS else name for name in libraries]
    chosen = any(len(row.get("tried", {})) > 1 for row in rows)
    head = ["", *(f"{title}: FVU" for title in titles), *(f"{title}: L0" for title in titles)]
    head += [f"{title}: choice" for title in titles] if chosen else []
    body = []
    for architecture, title in TITLES.items():
        own = [row for row in rows if row["architecture"] == architecture]
        if not own:
            continue
        groups = [[row for row in own if row["library"] == name] for name in libraries]
        fvus = [_mean(group, "fvu") for group in groups]
        near = [f for f, group in zip(fvus, groups, strict=True) if _is_near(group, l0)]
        least = min(near, default=None)
        cells = [_cell(group, "fvu", 4) for group in groups]
        cells = [f"**{c}**" if f == least else c for c, f in zip(cells, fvus, strict=True)]
        cells += [_cell(group, "l0", 1) for group in groups]
        cells += [_choice(group) for group in groups] if chosen else []
        body.append([title, *cells])
    return table(head, body)


def _choice(group: Sequence[Row]) -> str:
    if not group:
        return ""
    variant = group[0].get("variant")
    return f"{group[0]['lr']:g}" + (f", {variant}" if variant else "")


def _failed(group: Iterable[Row]) -> list[str]:
    return [row["error"] for row in group if "error" in row]


def _is_near(group: Sequence[Row], l0: int) -> bool:
    return not _failed(group) and bool(group) and abs(_mean(group, "l0") / l0 - 1) <= NEAR


def _mean(group: Sequence[Row], name: str) -> float:
    values = [row.get(name, math.nan) for row in group]
    return statistics.mean(values) if values else math.nan


def _cell(group: Sequence[Row], name: str, digits: int) -> str:
    for error in _failed(group):
        return f"failed: {error}" if name == "fvu" else ""
    values = [row[name] for row in group]
    if not values:
        return ""
    return f"{_mean(group, name):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"
