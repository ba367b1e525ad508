"""Kill runs at random and resume them: `python -m benchmarks.resuming --kills 50`.

Trains each architecture alone, with its callbacks, and all of them side by side: once to the end,
and once killed by SIGKILL at random moments and resumed until it ends. The exported weights of both
have to be equal, bit for bit. Data are activations of known features, so a run takes seconds.
Needs a system that can fork.
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
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lightning_sae.cli import main as lightning_sae

STEPS = 120


def part(name: str, **arguments: Any) -> dict[str, Any]:
    """A class and its arguments, as a configuration has them."""
    return {"class_path": f"lightning_sae.{name}", "init_args": arguments}


RESAMPLING = part(
    "callbacks.DeadFeatureResampling",
    every_n_steps=20,
    window=15,
    scheme="reinitialize",
    min_frequency=0.05,
)
PENALISED = [part("callbacks.L1Warmup", n_steps=30), part("callbacks.TargetL0", target=4.0)]
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "relu": (part("ReLUSAE", l1_coefficient=0.3), [*PENALISED, RESAMPLING]),
    "tied": (part("TiedSAE", l1_coefficient=0.3), PENALISED),
    "gated": (part("GatedSAE", l1_coefficient=0.3), PENALISED),
    "jumprelu": (part("JumpReLUSAE", l0_coefficient=0.05), [RESAMPLING]),
    "topk": (part("TopKSAE", k=4, revive="auxk", dead_after=500), []),
    "batch_topk": (part("BatchTopKSAE", k=4), []),
    "matryoshka": (part("MatryoshkaSAE", k=4, prefixes=3), []),
}


def configuration(case: str) -> dict[str, Any]:
    """A run of one case, or of all side by side."""
    rates = {"d_sae": 64, "lr": 0.01, "lr_warmup_steps": 10, "lr_decay_steps": 30}
    members = [
        {"name": name, "sae": _with(sae, rates), "callbacks": callbacks}
        for name, (sae, callbacks) in CASES.items()
    ]
    together = case == "side_by_side"
    model = part("SideBySide", members=members) if together else _with(CASES[case][0], rates)
    trainer = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 50,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "callbacks": [] if together else CASES[case][1],
    }
    data = part(
        "ToyDataModule", n_features=20, d_in=24, batch_size=64, n_validation=128, scale=True
    )
    quiet = {"checkpoint": {"every_n_steps": 10}, "progress_bar": {"refresh_rate": 0}}
    return {"trainer": trainer, "model": model, "data": data, **quiet}


def _with(described: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return {**described, "init_args": {**described["init_args"], **arguments}}


def start(folder: Path, case: str) -> int:
    """Start a run in a process of its own, from its checkpoint if there is one."""
    config, last = folder.with_suffix(".yaml"), folder / "checkpoints" / "last.ckpt"
    config.write_text(json.dumps(configuration(case)))
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


def killed_and_resumed(folder: Path, case: str, seconds: float, chance: random.Random) -> int:
    """Kill a run at random and resume it, until it ends; how often it was killed.

    Raises:
        RuntimeError: If it ends by itself with an error.
    """
    kills = 0
    while True:
        process, limit = start(folder, case), time.monotonic() + chance.uniform(0.1, seconds)
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


def runs(root: Path, kills: int, seed: int) -> Iterator[tuple[str, int, bool]]:
    """Cases in turn until there were so many kills: name, kills, and whether weights are equal."""
    chance, whole, done = random.Random(seed), {}, 0
    for number, case in enumerate(cycle([*CASES, "side_by_side"])):
        if case not in whole:
            began = time.monotonic()
            process = start(root / case, case)
            if os.waitpid(process, 0)[1]:
                raise RuntimeError(f"{root / case} failed; see {root / case}.log")
            whole[case] = weights(root / case), time.monotonic() - began
        expected, seconds = whole[case]
        folder = root / f"{case}-{number}"
        own = killed_and_resumed(folder, case, seconds, chance)
        found = weights(folder)
        same = found.keys() == expected.keys() and len(found) > 0
        same = same and all(torch.equal(found[name], w) for name, w in expected.items())
        done += own
        yield case, own, same
        if same:
            shutil.rmtree(folder)
        if done >= kills and number >= len(CASES):
            return


def main() -> None:
    """Read the arguments, run, and say what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resuming", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=50, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, all_kills, different = Path(tempfile.mkdtemp(prefix="resuming-")), 0, 0
    for case, kills, same in runs(root, options.kills, options.seed):
        all_kills, different = all_kills + kills, different + (not same)
        sys.stdout.write(f"{case:14} {kills:4} kills  {'equal' if same else 'DIFFERENT'}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{all_kills} kills, {different} runs differ. Made: {root}\n")
    sys.exit(min(different, 1))


if __name__ == "__main__":
    main()
