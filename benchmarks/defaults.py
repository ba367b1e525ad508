"""What every architecture gives with its defaults: `python -m benchmarks.defaults --model FOLDER`.

All SAEs at a hook are trained in one run, two widths and several seeds of each architecture. With
`--given lr_decay_steps=0.25` the classes get that argument, and the page what it changes; several
`--given` are compared.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.command_line import say
from benchmarks.formatting import Row, table
from benchmarks.language_model_source import absolute
from benchmarks.machine import surroundings
from lightning_sae.cli import main as lightning_sae

L0 = 32
"""The default `k`, and so the L0 that SAEs without a `k` are asked for."""

STEERED = {"target_l0": L0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ReLUSAE": STEERED,
    "TiedSAE": STEERED,
    "GatedSAE": STEERED,
    "JumpReLUSAE": STEERED,
    "TopKSAE": {},
    "BatchTopKSAE": {},
    "MatryoshkaSAE": {},
}
"""Each with its arguments besides the number of latents."""

COLUMNS = {"l0": 1, "fvu": 3, "loss_recovered_zero": 3, "dead_fraction": 3}
HEADINGS = ("L0", "FVU", "loss recovered", "dead")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train at one hook, and write the page with the figures of all hooks so far."""
    asked = parser().parse_args(arguments)
    output = Path(asked.output).with_suffix(".json")
    output.parent.mkdir(parents=True, exist_ok=True)
    results: Row = json.loads(output.read_text()) if output.exists() else {}
    plan = {name: vars(asked)[name] for name in ("hook", "steps", "batch_size", "seeds")}
    about = surroundings(1, "benchmarks.defaults")
    sys.argv[1:] = []  # or Lightning's command line warns that it is given others
    with tempfile.TemporaryDirectory() as folder:
        found = trained(asked, Path(folder))
    results[asked.name] = merged(results.get(asked.name), about, plan, found)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(results))
    say(f"Wrote {output.with_suffix('.md')} and {output}.")


def merged(before: Row | None, about: Row, plan: Row, rows: list[Row]) -> Row:
    """The part of a hook: new rows replace rows of the same SAE and arguments."""
    kept: list[Row] = []
    commands: list[str] = []
    if before is not None and before["plan"] == plan:
        again = {(row["architecture"], row.get("given", "")) for row in rows}
        kept = [
            row
            for row in before["rows"]
            if (row["architecture"], row.get("given", "")) not in again
        ]
        commands = before["commands"] if kept else []
    order = [*ARCHITECTURES]
    everything = sorted([*kept, *rows], key=lambda row: order.index(row["architecture"]))
    commands = [*commands, f"{about['command']}, {about['date']}"]
    return {"commands": commands, "surroundings": about, "plan": plan, "rows": everything}


def parser() -> argparse.ArgumentParser:
    """The command line; every size is an option."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    found.add_argument("--name", default="embedded", help="of the language model, on the page")
    found.add_argument("--model", default="embedded", help="a transformers folder")
    found.add_argument("--text", default="embedded", help="a text file")
    found.add_argument("--hook", default="blocks.2.hook_resid_post", help="%(default)s")
    found.add_argument("--output", default="docs/settings", help="path of the page, less .md")
    found.add_argument("--latents", type=int, nargs="+", default=(512, 1024), help="%(default)s")
    found.add_argument(
        "--architectures", nargs="+", choices=[*ARCHITECTURES], default=[*ARCHITECTURES]
    )
    found.add_argument("--given", nargs="+", action="append", metavar="NAME=VALUE")
    sizes = {"steps": 1000, "batch-size": 1024, "seeds": 2, "n-tokens": 32768}
    for name, default in sizes.items():
        found.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    return found


def trained(asked: argparse.Namespace, folder: Path) -> list[Row]:
    """Figures of all SAEs on held-out text, each with its architecture, width and seed."""
    config = folder / "plan.yaml"
    config.write_text(yaml.safe_dump(run(asked, folder / "run")))
    lightning_sae(["fit", "--config", str(config)])
    last = folder / "run" / "checkpoints" / "last.ckpt"
    lightning_sae(["test", "--config", str(config), "--ckpt_path", str(last)])
    return [
        {
            "architecture": kind,
            "given": given,
            "d_sae": d_sae,
            "seed": seed,
            **figures(folder / "run", f"{name_of(kind, given)}-d_sae={d_sae}-seed={seed}"),
        }
        for kind in asked.architectures
        for given in variants(asked)
        for d_sae in asked.latents
        for seed in range(asked.seeds)
    ]


def variants(asked: argparse.Namespace) -> list[str]:
    """The arguments that differ from the defaults, as one string; empty if there are none."""
    return [" ".join(words) for words in asked.given or [[]]]


def name_of(kind: str, given: str) -> str:
    """The name of the members with these arguments."""
    return "-".join([kind, *given.replace("=", "-").split()])


def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The configuration of the run."""
    members = [
        {
            "name": name_of(kind, given),
            "sae": {
                "class_path": f"lightning_sae.{kind}",
                "init_args": {**ARCHITECTURES[kind], **_arguments(given)},
            },
            "sweep": {"d_sae": list(asked.latents), "seed": list(range(asked.seeds))},
        }
        for kind in asked.architectures
        for given in variants(asked)
    ]
    data = {
        "hook_name": asked.hook,
        "model": absolute(asked.model),
        "text": absolute(asked.text),
        "batch_size": asked.batch_size,
    }
    return {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "max_steps": asked.steps,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "evaluation": {"n_tokens": asked.n_tokens},
        "model": {"class_path": "lightning_sae.SideBySide", "init_args": {"members": members}},
        "data": {"class_path": "lightning_sae.ActivationDataModule", "init_args": data},
    }


def _arguments(given: str) -> dict[str, Any]:
    """`NAME=VALUE` as a dictionary."""
    pairs = (word.partition("=") for word in given.split())
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def figures(root: Path, name: str) -> Row:
    """Those of the page; none for an SAE that was stopped."""
    path = root / "members" / name / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {column: found.get(column) for column in COLUMNS}


def page(results: Row) -> str:
    """The page in Markdown."""
    lines = [
        "# What the defaults give",
        "",
        "Every architecture with its defaults: learning rate, schedule, initialisation, losses",
        f"and callbacks are those of the class. `k` is {L0} by default; SAEs that have none are",
        f"asked for the same by `target_l0={L0}`. Figures are of held-out text: means over seeds,",
        "± half the distance of the largest from the smallest. Widths are numbers of latents; loss",
        "recovered is against zero ablation.",
        "",
        "**Learning rate.** The default one falls over the last quarter of a run whose length is",
        "known. JumpReLU SAEs have .7 of the others', and tied SAEs half of it, constant. A rate",
        "that is given stays constant, unless `lr_decay_steps` is given too. The tables of other",
        "arguments show a constant rate, a lower and a higher one. Higher rates lower FVU in short",
        "runs, but more latents die.",
        "",
        "**Decoder norms.** `decoder_norm=free`, without the callback `DecoderNormProjection`, is",
        "better for Matryoshka SAEs at these rates; `docs/quality.md` compares it for each",
        "architecture. Unit norms, of the documents that are implemented here, stay the default.",
        "Rows that are free may start at another norm, as in SAELens: `decoder_init_norm=0.1`.",
        "This is no start for JumpReLU SAEs, whose thresholds fit the first batch and do not grow",
        "as fast as the rows, so that L0 ends far above the target, which they say.",
        "",
        "**Dead latents.** `revive=auxk`, which gives dead latents a gradient, is the default of",
        "TopK, BatchTopK and Matryoshka SAEs. Tied and gated SAEs have few dead latents with it",
        "and `dead_after=25000`, but a larger FVU, less so with a small `revive_coefficient`:",
        "`--given revive=auxk dead_after=25000` measures it.",
    ]
    for name, part in results.items():
        plan = part["plan"]
        lines += [
            "",
            f"## {name}, `{plan['hook']}`",
            "",
            f"{plan['steps']} steps of {plan['batch_size']} activations, {plan['seeds']} seed(s).",
            *(f"Made by {command}." for command in part["commands"]),
            "",
            *table(("", "latents", *HEADINGS), _rows(defaults_of(part["rows"]))),
            "",
            *summary(defaults_of(part["rows"])),
            *_changes(part["rows"]),
        ]
    return "\n".join(lines) + "\n"


def defaults_of(rows: Sequence[Row]) -> list[Row]:
    """The rows measured with default arguments only."""
    return [row for row in rows if not row.get("given")]


def _changes(rows: Sequence[Row]) -> list[str]:
    """A table of FVU and dead latents with other arguments, relative to the defaults."""
    body = []
    for kind, d_sae, given in {
        (r["architecture"], r["d_sae"], r.get("given", "")): 0 for r in rows
    }:
        sizes = [r for r in rows if (r["architecture"], r["d_sae"]) == (kind, d_sae)]
        group = [row for row in sizes if row.get("given", "") == given]
        before = [row["fvu"] for row in defaults_of(sizes)]
        after = [row["fvu"] for row in group]
        if given and before and None not in [*before, *after]:
            change = f"{statistics.mean(after) / statistics.mean(before) - 1:+.1%}"
            dead = (
                f"{_cell(defaults_of(sizes), 'dead_fraction')} to {_cell(group, 'dead_fraction')}"
            )
            body.append([f"`{kind}`", str(d_sae), f"`{given}`", _cell(group, "l0"), change, dead])
    head = ("", "latents", "arguments", "L0", "change of FVU", "dead")
    return (
        ["", "Other arguments, beside the same figures with the defaults:", "", *table(head, body)]
        if body
        else []
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """How far L0 is from its target at most, and what is dead."""
    found = [row for row in rows if None not in (row[name] for name in COLUMNS)]
    if not found:
        return []
    far = max(found, key=lambda row: abs(row["l0"] / L0 - 1))
    dead = max(found, key=lambda row: row["dead_fraction"])
    return [
        f"- Furthest from an L0 of {L0}: {_name(far)}, {far['l0'] / L0 - 1:+.1%}.",
        f"- Most dead latents: {_name(dead)}, {dead['dead_fraction']:.1%}.",
    ]


def _name(row: Row) -> str:
    return f"`{row['architecture']}` with {row['d_sae']} latents, seed {row['seed']}"


def _rows(rows: Sequence[Row]) -> list[list[str]]:
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["d_sae"]), []).append(row)
    return [
        [f"`{kind}`", str(d_sae), *(_cell(group, name) for name in COLUMNS)]
        for (kind, d_sae), group in groups.items()
    ]


def _cell(group: Sequence[Row], name: str) -> str:
    values = [row[name] for row in group]
    if None in values:
        return "stopped"
    digits = COLUMNS[name]
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
