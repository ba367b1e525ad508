"""Kill runs at random and resume them: `python -m benchmarks.resuming --kills 50`.

Trains each architecture alone, with callbacks, and all of them side by side: once to the end, and
then killed by SIGKILL at random moments and resumed until it ends. The exported weights of both
have to be equal, bit for bit. Data are activations of known features, so a run takes seconds. Ends
with a table of all cases, and with exit status 1 if a run differs. Needs a system that can fork.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from lightning_sae import ReLUSAE
from lightning_sae.cli import main as lightning_sae

STEPS, D_IN, D_SAE = 120, 24, 64


def part(name: str, **arguments: Any) -> dict[str, Any]:
    """A class and its arguments, as a configuration has them."""
    return {"class_path": f"lightning_sae.{name}", "init_args": arguments}


REINITIALISED = part(
    "callbacks.DeadFeatureResampling",
    every_n_steps=20,
    window=15,
    scheme="reinitialize",
    min_frequency=0.05,
)
RESAMPLED = part(
    "callbacks.DeadFeatureResampling", every_n_steps=20, min_frequency=0.05, n_inputs=256
)
PENALISED = [part("callbacks.L1Warmup", n_steps=30), part("callbacks.TargetL0", target=4.0)]
L1 = {"l1_coefficient": 0.3}
AUX = {"orthogonality_coefficient": 10.0, "orthogonality_window": 7}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "relu": (part("ReLUSAE", **L1), [*PENALISED, REINITIALISED]),
    "tied": (part("TiedSAE", **L1), PENALISED),
    "gated": (part("GatedSAE", **L1), PENALISED),
    "rescale_and_shift": (part("RescaleAndShiftSAE", **L1), [*PENALISED, RESAMPLED]),
    "jumprelu": (part("JumpReLUSAE", l0_coefficient=0.05), [REINITIALISED]),
    "topk": (part("TopKSAE", k=4, revive="auxk", dead_after=500), []),
    "batch_topk": (part("BatchTopKSAE", k=4), []),
    "matryoshka": (part("MatryoshkaSAE", k=4, prefixes=3), []),
    "orthogonal_latents": (
        part("TiedSAE", **L1, **AUX),
        [part("callbacks.AuxThresholdWarmup", delay_steps=30, warmup_steps=40)],
    ),
    "target_l0": (part("JumpReLUSAE", target_l0=4.0), [RESAMPLED]),
}
"""SAE and callbacks of each case; all of these together are the case `side_by_side`."""

DIRECTIONS, TRAINED = "directions.safetensors", "trained"
"""Files below the folder of all runs: for `OrthogonalTo`, and the SAE that `RescaledSAE` tunes."""


def alone(root: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The cases that cannot be members of a run side by side, or need files of `root`."""
    orthogonal = part("callbacks.OrthogonalTo", directions=str(root / DIRECTIONS))
    normed = part("callbacks.DecoderNormProjection")
    return {
        "rescaled": (part("RescaledSAE", method="decoder", sae=str(root / TRAINED)), []),
        "without_directions": (part("ReLUSAE", **L1), [orthogonal, normed, RESAMPLED]),
    }


def write_files(root: Path) -> None:
    """Write the files that `alone` names."""
    torch.manual_seed(0)
    save_file({"directions": torch.randn(2, D_IN)}, root / DIRECTIONS)
    sae = ReLUSAE(D_IN, D_SAE)
    sae.is_trained = True
    sae.save_pretrained(root / TRAINED)


def configuration(root: Path, case: str, precision: str) -> dict[str, Any]:
    """A run of one case, or of all side by side."""
    cases = {**CASES, **alone(root)}
    rates = {"d_sae": D_SAE, "lr": 0.01, "lr_warmup_steps": 10, "lr_decay_steps": 30}
    members = [
        {"name": name, "sae": _with(sae, rates), "callbacks": callbacks}
        for name, (sae, callbacks) in CASES.items()
    ]
    together = case == "side_by_side"
    model = part("SideBySide", members=members) if together else _with(cases[case][0], rates)
    trainer = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "precision": precision,
        "accumulate_grad_batches": 2,
        "val_check_interval": 50,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "callbacks": [] if together else cases[case][1],
    }
    data = part(
        "ToyDataModule", n_features=20, d_in=D_IN, batch_size=64, n_validation=128, scale=True
    )
    quiet = {"checkpoint": {"every_n_steps": 10}, "progress_bar": {"refresh_rate": 0}}
    return {"trainer": trainer, "model": model, "data": data, **quiet}


def _with(described: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return {**described, "init_args": {**described["init_args"], **arguments}}


def start(folder: Path, case: str, precision: str) -> int:
    """Start a run in a process of its own, from its checkpoint if there is one."""
    config, last = folder.with_suffix(".yaml"), folder / "checkpoints" / "last.ckpt"
    config.write_text(json.dumps(configuration(folder.parent, case, precision)))
    words = ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder)]
    words += ["--ckpt_path", str(last)] if last.exists() else []
    process = os.fork()
    if process == 0:
        status = 1
        try:
            with (folder.with_suffix(".log")).open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.argv = ["lightning-sae"]
                lightning_sae(words)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return process


def killed_and_resumed(
    folder: Path, case: str, precision: str, seconds: float, chance: random.Random
) -> int:
    """Kill a run at random and resume it, until it ends; how often it was killed.

    Raises:
        RuntimeError: If it ends by itself with an error.
    """
    kills = 0
    while True:
        process = start(folder, case, precision)
        # Later from kill to kill, so that a run on a busy machine ends too.
        limit = time.monotonic() + chance.uniform(0.1, seconds * (0.5 + 0.1 * kills))
        while (ended := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < limit:
            time.sleep(0.002)
        if ended[0] == 0:
            os.kill(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
        status = os.waitstatus_to_exitcode(ended[1])
        if status == 0:
            return kills
        if status != -signal.SIGKILL:
            raise RuntimeError(f"{folder} ended with {status}; see {folder.with_suffix('.log')}")
        kills += 1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All exported weights of a run; of several SAEs by their names."""
    found = sorted(folder.rglob("sae/sae.safetensors"))
    return {
        f"{path.parent.parent.name if path.parents[1] != folder else ''}{name}": weight
        for path in found
        for name, weight in load_file(path).items()
    }


class Result(NamedTuple):
    """One run that was killed: its case, how often, and whether its weights are right."""

    case: str
    kills: int
    is_equal: bool


def runs(root: Path, kills: int, seed: int, precision: str) -> Iterator[Result]:
    """Runs of all cases in turn, until there were so many kills and each case had its turn."""
    chance, whole, done = random.Random(seed), {}, 0
    cases = [*CASES, *alone(root), "side_by_side"]
    write_files(root)
    for number, case in enumerate(cycle(cases)):
        if case not in whole:
            began = time.monotonic()
            process = start(root / case, case, precision)
            if os.waitpid(process, 0)[1]:
                raise RuntimeError(f"{root / case} failed; see {root / case}.log")
            whole[case] = weights(root / case), time.monotonic() - began
        expected, seconds = whole[case]
        folder = root / f"{case}-{number}"
        own = killed_and_resumed(folder, case, precision, seconds, chance)
        found = weights(folder)
        same = found.keys() == expected.keys() and len(found) > 0
        same = same and all(torch.equal(found[name], w) for name, w in expected.items())
        done += own
        yield Result(case, own, same)
        if same:
            shutil.rmtree(folder)
        if done >= kills and number + 1 >= len(cases):
            return


def table(results: Sequence[Result], root: Path) -> str:
    """Kills and equal runs of each case, as a Markdown table."""
    cases = {**CASES, **alone(root)}
    lines = ["| run | SAE | callbacks | kills | equal runs |", "|---|---|---|---|---|"]
    for case in dict.fromkeys(result.case for result in results):
        own = [result for result in results if result.case == case]
        kills, equal = sum(result.kills for result in own), sum(result.is_equal for result in own)
        sae, callbacks = cases.get(case, ({}, []))
        names = ", ".join(f"`{_name(each)}`" for each in callbacks)
        kind = f"`{_name(sae)}`" if sae else f"the first {len(CASES)}"
        lines.append(f"| {case} | {kind} | {names} | {kills} | {equal} of {len(own)} |")
    return "\n".join(lines)


def _name(described: dict[str, Any]) -> str:
    return str(described["class_path"]).rsplit(".", 1)[-1]


def main() -> None:
    """Read the arguments, run, and say what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resuming", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=50, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--precision", default="32-true", help="as Lightning's; %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, results = Path(tempfile.mkdtemp(prefix="resuming-")), []
    for result in runs(root, options.kills, options.seed, options.precision):
        results.append(result)
        equal = "equal" if result.is_equal else "DIFFERENT"
        sys.stdout.write(f"{result.case:20} {result.kills:4} kills  {equal}\n")
        sys.stdout.flush()
    different = sum(not result.is_equal for result in results)
    kills = sum(result.kills for result in results)
    sys.stdout.write(f"\n{table(results, root)}\n\n")
    sys.stdout.write(f"{kills} kills, {len(results)} runs, {different} differ. Made: {root}\n")
    sys.exit(min(different, 1))


if __name__ == "__main__":
    main()
