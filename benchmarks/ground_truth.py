"""Compare with SAELens on activations with known features: `python -m benchmarks.ground_truth`."""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command_line import say
from benchmarks.formatting import Row, table
from benchmarks.ground_truth_worker import THEIRS, save_activations
from benchmarks.libraries.base import OURS
from benchmarks.machine import surroundings
from benchmarks.measure import run_process
from lightning_sae.studies.ground_truth.settings import ARCHITECTURES, RECIPE, World

PEER = "SAELens"
CLOSE = 0.05  # relative distance to the target L0 at which the search for a coefficient ends
ATTEMPTS = 4  # trainings of the search
STEEPEST = 4.0  # factor by which the search changes a coefficient at most
FIGURES = {
    "ours": (("l0", 1), ("mcc", 3), ("f1", 3), ("fvu", 4), ("shrinkage", 2), ("dead", 3)),
    "theirs": (
        ("sae_l0", 1),
        ("mcc", 3),
        ("f1_score", 3),
        ("fvu", 4),
        ("shrinkage", 2),
        ("dead", 3),
    ),
}
HEADINGS = ("L0", "MCC", "F1", "FVU", "shrinkage", "dead")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and save activations, train both libraries on them one after another, write the page."""
    asked = parser().parse_args(arguments)
    world = World(asked.n_features, asked.d_in)
    output = Path(asked.output).with_suffix(".json")
    output.parent.mkdir(parents=True, exist_ok=True)
    about = surroundings(asked.threads, "benchmarks.ground_truth")
    results: Row = {"surroundings": about, "plan": vars(asked), "recipe": RECIPE, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seeds):
            path = Path(folder) / f"{seed}.safetensors"
            save_activations(path, world, seed, asked.samples)
            for row in _one_seed(asked, seed, path):
                results["rows"].append(row)
                _write(results, output)
            path.unlink()
    say(f"Wrote {output.with_suffix('.md')} and {output}.")


def parser() -> argparse.ArgumentParser:
    """The command line; every size is an option."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.ground_truth", description=__doc__)
    found.add_argument("--output", default="docs/ground-truth", help="path of the page, less .md")
    found.add_argument(
        "--architectures", nargs="+", choices=list(THEIRS), default=list(THEIRS), help="%(default)s"
    )
    for name, default in {
        "n-features": 256,
        "d-in": 64,
        "d-sae": 256,
        "l0": 8,
        "samples": 1_000_000,
        "seeds": 3,
        "threads": 1,
        "timeout": 1800,
    }.items():
        found.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    return found


def _one_seed(asked: argparse.Namespace, seed: int, path: Path) -> Iterator[Row]:
    for architecture in asked.architectures:
        job = {"architecture": architecture, "path": str(path), "l0": asked.l0, "seed": seed}
        limits = {"threads": asked.threads, "timeout": asked.timeout}
        job["d_sae"] = asked.d_sae
        mine = _measured(job | {"library": OURS, "coefficient": None}, limits)
        yield mine
        is_steered = ARCHITECTURES[architecture].is_steered
        first = mine.get("coefficient", 1.0) if is_steered else None
        yield _matched(job | {"library": PEER}, first, asked.l0, limits)


def _measured(job: Row, limits: Row) -> Row:
    label = {key: job[key] for key in ("library", "architecture", "seed", "d_sae")}
    say(f"{job['library']} {job['architecture']}, seed {job['seed']}")
    call = json.dumps({**job, "threads": limits["threads"]})
    answer = run_process([sys.executable, "-m", "benchmarks.ground_truth_worker", call], **limits)
    say(f"    {outline(answer)}")
    return {**label, "trainings": 1, **answer}


def outline(answer: Row) -> str:
    """A short summary of what a job returned."""
    if "error" in answer:
        return f"failed: {answer['error']}"
    figures = answer["ours"]
    return f"{answer['seconds']:.1f} CPU s, L0 {figures['l0']:.2f}, MCC {figures['mcc']:.3f}"


def _matched(job: Row, coefficient: float | None, l0: int, limits: Row) -> Row:
    """Train SAELens' SAE, up to `ATTEMPTS` times, and return the one with L0 closest to `l0`.

    The search for the penalty's coefficient starts from the one that ours ended with. It follows
    the slope of log L0 over log coefficient between the last two trainings, at first taken as -1.
    """
    tried: list[Row] = []
    for _ in range(ATTEMPTS):
        tried.append(_measured(job | {"coefficient": coefficient}, limits))
        if "error" in tried[-1] or coefficient is None or abs(_error(tried[-1], l0)) < CLOSE:
            break
        coefficient *= math.exp(_change(tried, l0))
    best = min(tried, key=lambda row: math.inf if "error" in row else abs(_error(row, l0)))
    return best | {"trainings": len(tried)}


def _error(row: Row, l0: int) -> float:
    return math.log(max(row["ours"]["l0"], 0.01) / l0)


def _change(tried: Sequence[Row], l0: int) -> float:
    """Change of the log of the coefficient for the next training."""
    slope = -1.0
    if len(tried) > 1:
        before, last = tried[-2:]
        rise = _error(last, l0) - _error(before, l0)
        slope = min(-0.2, rise / math.log(last["coefficient"] / before["coefficient"]))
    bound = math.log(STEEPEST)
    return max(-bound, min(bound, -_error(tried[-1], l0) / slope))


# The page.


def _write(results: Row, output: Path) -> None:
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(results))


def page(results: Row) -> str:
    """The page of the comparison in Markdown."""
    plan, recipe = results["plan"], results["recipe"]
    lines = [
        "# Ground truth: comparison with SAELens",
        "",
        f"{plan['n_features']} features in {plan['d_in']} dimensions, in a hierarchy and with "
        f"frequencies by Zipf's law, drawn by `ToyDataModule` and saved: {plan['samples']:,} "
        f"training and 65,536 held-out activations, which all trainers read. "
        f"{plan['d_sae']} latents, target L0 {plan['l0']}, {plan['seeds']} seeds, each with its "
        "own toy data; mean ± standard deviation.",
        "",
        *_rules(plan, recipe),
    ]
    for by, title in (("ours", "By the metrics of lightning-sae"), ("theirs", "By SAELens' own")):
        lines += ["", f"## {title}", "", *_table(by, results["rows"]), "", *NOTES[by]]
    lines += ["", "## Where and with what", ""]
    lines += [f"- {what}: {text}" for what, text in results["surroundings"].items()]
    return "\n".join(lines) + "\n"


def _rules(plan: Row, recipe: Row) -> list[str]:
    """Settings that both libraries share, and those that differ."""
    shared = ", ".join(f"{name} {value:g}" for name, value in recipe.items() if name != "auxk")
    return [
        f"- **The same for both**: {shared}, where warm-ups, decay and `dead_after` are shares of "
        "the run; JumpReLU's bandwidth and first threshold.",
        "- **As each library has it**: the rest. All of ours have AuxK for dead latents, weighted "
        f"{recipe['auxk']:g}; SAELens has an AuxK of its own in its TopK family. Decoder rows of "
        "SAELens have any norm. Ours have norm 1 in ReLU and Gated SAEs, whose penalty depends on "
        "the size of activations, and any norm in the others. Learning rate, bandwidth and this "
        "were chosen with ours alone, on seeds not in the table; that norms matter in the TopK "
        "family was first seen on seed 0.",
        "- **L0**: ours adjusts the penalty to it within one training (`TargetL0`). SAELens has no "
        "such feature: its coefficient is searched by repeated trainings, starting from our final "
        f"one, until L0 is within {CLOSE:.0%} or after {ATTEMPTS}; the closest counts. Where L0 "
        "is an argument, SAELens' evaluation selects latents per batch of 1,024, as its runner "
        "does; ours uses the threshold from training.",
        "- **CPU s**: seconds of processor time of that one training, with "
        f"{plan['threads']} thread, activations in memory.",
    ]


NOTES = {
    "ours": [
        "MCC: mean |cosine| of decoder rows and features over their best one-to-one matching. F1: "
        "of each latent as a detector of the feature that its decoder row points along most, dead "
        "ones counting 0. FVU: squared error over variance. Shrinkage: the magnitude that a latent "
        "gives its feature over the true one, median over latents. Dead: share of latents that "
        "never fire."
    ],
    "theirs": [
        "Results of `sae_lens.synthetic.eval_sae_on_synthetic_data` for the same SAEs on the same "
        "held-out activations. FVU is 1 minus its explained variance; its shrinkage is the mean "
        "of ‖x̂‖ / ‖x‖."
    ],
}


def _table(by: str, rows: Sequence[Row]) -> list[str]:
    head = ["", *HEADINGS, "CPU s", "trainings"]
    body = []
    for architecture in ARCHITECTURES:
        for library in (OURS, PEER):
            own = [r for r in rows if (r["architecture"], r["library"]) == (architecture, library)]
            if own:
                body.append([f"{ARCHITECTURES[architecture].title}, {library}", *_cells(by, own)])
    return table(head, body)


def _cells(by: str, rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if "error" in row]
    if failed:
        return [f"failed: {failed[0]['error']}", *[""] * (len(HEADINGS) + 1)]
    figures = [_with_spread([_figure(by, row, name) for row in rows], d) for name, d in FIGURES[by]]
    seconds = _with_spread([row["seconds"] for row in rows], 1)
    return [*figures, seconds, _with_spread([row["trainings"] for row in rows], 1)]


def _figure(by: str, row: Row, name: str) -> float:
    found = row[by]
    if by == "ours":
        return float(found[name])
    match name:
        case "f1_score":
            return float(found["classification"]["f1_score"])
        case "fvu":
            return 1 - float(found["explained_variance"])
        case "dead":
            return float(found["dead_latents"]) / row["d_sae"]
    return float(found[name])


def _with_spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
