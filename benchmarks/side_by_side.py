"""Compare many SAEs in one run with as many runs: `python -m benchmarks.side_by_side`.

Trains SAEs side by side in one run, then each in a run of its own, one after another, and times the
language model alone on as many tokens as a run reads. A run is timed from the call of `fit` until
it returns. This includes the first filling of the shuffling buffer, the estimate of mean and scale,
reading ahead and all steps, but not loading the language model and opening the text. Nothing is
logged or saved. No other SAE library is needed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import add_option, say
from benchmarks.formatting import table
from benchmarks.language_model_source import absolute
from benchmarks.machine import surroundings
from benchmarks.measure import run_process
from benchmarks.side_by_side_worker import Plan, Row

ABOUT = ("date", "processor", "system", "with", "commit", "command")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write `side_by_side.json` and `.md` to a folder, and print the page."""
    asked = vars(parser().parse_args(arguments))
    threads, timeout = asked.pop("threads"), asked.pop("timeout")
    folder = Path(asked.pop("output"))
    plan = Plan(**asked | {name: absolute(asked[name]) for name in ("model", "text")})
    folder.mkdir(parents=True, exist_ok=True)
    results = measured(plan, threads, timeout)
    (folder / "side_by_side.json").write_text(json.dumps(results, indent=1) + "\n")
    text = page(results)
    (folder / "side_by_side.md").write_text(text)
    sys.stdout.write(text)
    say(f"Wrote {folder / 'side_by_side.json'} and {folder / 'side_by_side.md'}.")


def parser() -> argparse.ArgumentParser:
    """The command line; every size is an option."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.side_by_side", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument("--output", default="runs/benchmark_side_by_side", help="a folder")
    found.add_argument("--threads", type=int, default=2, help="%(default)s")
    found.add_argument("--timeout", type=float, default=1800, help="seconds of a process")
    for name, default in Plan._field_defaults.items():
        add_option(found, name, default)
    return found


def measured(plan: Plan, threads: int, timeout: float) -> Row:
    """Run every measurement, each in a process of its own.

    Raises:
        RuntimeError: If a measurement fails.
    """

    def answer(job: str, **arguments: Any) -> Row:
        say(f"{job} {' '.join(map(str, arguments.values()))}")
        call = {"job": job, "plan": plan._asdict(), "arguments": arguments, "threads": threads}
        command = [sys.executable, "-m", "benchmarks.side_by_side_worker", json.dumps(call)]
        found = run_process(command, threads, timeout)
        if "error" in found:
            raise RuntimeError(f"{job} failed: {found['error']}")
        walls = [found["wall"]] if "wall" in found else [m["wall"] for m in found["members"]]
        say(f"    {sum(walls):.1f} s")
        return found

    together = answer("together")
    groups = [(architecture, hook) for architecture in plan.architectures for hook in plan.hooks]
    alone = [answer("alone", architecture=one, hook=hook) for one, hook in groups]
    return {
        "surroundings": surroundings(threads, "benchmarks.side_by_side"),
        "plan": plan._asdict(),
        "together": together,
        "alone": [
            member | {"hook": hook}
            for (_, hook), group in zip(groups, alone, strict=True)
            for member in group["members"]
        ],
        "alone_peak_bytes": max(group["peak_bytes"] for group in alone),
        "language_model": answer("language_model", tokens=together["tokens"]),
    }


def page(results: Row) -> str:
    """The page of the comparison in Markdown."""
    plan, together, alone = results["plan"], results["together"], results["alone"]
    n, model = len(alone), results["language_model"]
    runs = sum(run["wall"] for run in alone)
    models = sum(model["walls"][run["hook"]] for run in alone)
    same = {member["name"]: member["sha256"] for member in together["members"]}
    equal = {run["name"]: run["sha256"] == same[run["name"]] for run in alone}
    lines = [
        f"# {n} SAEs in one run, and in {n} runs",
        "",
        f"{', '.join(plan['architectures'])} with {len(plan['coefficients'])} L1 coefficients at "
        f"{', '.join(plan['hooks'])}; {plan['d_sae']} latents, {plan['steps']} steps on batches of "
        f"{plan['batch_size']}. Each run fills its buffer of {plan['buffer_size']} activations "
        f"and reads {together['tokens']:,} tokens.",
        "",
        *(f"- {name}: {results['surroundings'][name]}" for name in ABOUT),
        "",
        *table(
            ["", "seconds", "in units of the one run", "largest memory, MiB"],
            [
                _row(f"{n} SAEs in one run", together["wall"], together, together["peak_bytes"]),
                _row(f"{n} runs, one after another", runs, together, results["alone_peak_bytes"]),
                _row("the language model alone, on the tokens of a run", model["wall"], together),
                _row(f"the language model alone, on those of {n} runs", models, together),
            ],
        ),
        "",
        f"One run takes {together['wall'] / runs:.0%} of the time of the {n} runs. The language "
        f"model is {model['wall'] / together['wall']:.0%} of the one run, and "
        f"{models / runs:.0%} of the {n}. Weights equal bit for bit: {sum(equal.values())} of {n}.",
        "",
        *table(
            ["run alone", "seconds", "L0 at its end", "weights as side by side"],
            [
                [
                    run["name"],
                    f"{run['wall']:.2f}",
                    f"{run['l0']:.1f}",
                    "equal" if equal[run["name"]] else "different",
                ]
                for run in alone
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(what: str, seconds: float, together: Row, peak: int | None = None) -> list[str]:
    memory = "" if peak is None else f"{peak / 2**20:,.0f}"
    return [what, f"{seconds:.1f}", f"{seconds / together['wall']:.2f}", memory]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
