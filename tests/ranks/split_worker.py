"""What one of two ranks, and one of four, does with a split dictionary."""

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_sae import SplitDictionary
from lightning_sae.cli import main as lightning_sae
from tests.ranks.cases import BATCH, CASES, activations, train
from tests.ranks.split_cases import (
    IN_FOUR,
    IN_GRID,
    SENT,
    SPLIT,
    STREAMED,
    Spoils,
    ends_with,
    refused,
    sent_by,
    toy_run,
    watched,
)
from tests.ranks.split_memory import drawn_later, large, peaks


def of_two(rank: int, folder: Path) -> dict[str, Any]:
    """What a rank finds that holds a half of a dictionary."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {
        "cases": {
            name: train(case, activations(), strategy=SplitDictionary(), devices=2)
            for name, case in SPLIT.items()
        },
        "sent": {name: sent_by(case) for name, case in SENT.items()},
        "refused": [refused(partial(ends_with, parts)) for parts in (3, 1 + rank)],
        "not_finite": refused(partial(ends_with, 2, Spoils(rank=1))),
        "later": drawn_later(),
        "peaks": peaks(folder / "memory"),
    }
    watched(folder / "watched", parts=2)
    found["streamed"] = {name: stopped_and_whole(rank, folder / name) for name in STREAMED}
    last = folder / "two" / "checkpoints" / "last.ckpt"
    with large() as found["drawn"]:
        lightning_sae(["fit", "--config", str(folder / "two.yaml")])
    lightning_sae(["test", "--config", str(folder / "two.yaml"), "--ckpt_path", str(last)])
    return found


def stopped_and_whole(rank: int, folder: Path) -> dict[str, Any]:
    """Weights of runs that were stopped, were begun by one rank, and were not stopped."""
    of_two: dict[str, Any] = {"parts": 2, "devices": 2}
    toy_run(folder / "stopped", 4, **of_two)
    if rank == 0:
        shutil.copytree(folder / "stopped", folder / "for-one")
    torch.distributed.barrier()
    resumed, of_one, whole = (
        toy_run(folder / name, 8, **of_two) for name in ("stopped", "one", "whole")
    )
    sae, trainer = whole.pop("sae"), whole.pop("trainer")
    sae.layout.dense = rank == 1
    trainer.save_checkpoint(folder / "layouts" / "checkpoints" / "last.ckpt")
    continued = toy_run(folder / "layouts", 8, **of_two)["sae"]
    sae.save_pretrained(folder / "exported")
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        f = sae.encode(x)
        used = {"x": x, "f": f, "x_hat": sae(x), "decoded": sae.decode(f)}
    return {
        "resumed": resumed["state"],
        "of_one": of_one["state"],
        "whole": whole,
        "used": used,
        "dense": continued.layout.dense,
        "own": {name: weight.detach().clone() for name, weight in sae.named_parameters()},
    }


def of_four(rank: int, folder: Path) -> dict[str, Any]:
    """What a rank finds that holds a half of one of two copies, and then a quarter of one."""
    warnings.simplefilter("ignore")
    half = BATCH // 2
    own = activations()[:, rank // 2 * half : (rank // 2 + 1) * half]
    found: dict[str, Any] = {
        name: train(CASES[name], own, strategy=SplitDictionary(2), devices=4) for name in IN_GRID
    }
    for name in IN_FOUR:
        strategy = SplitDictionary()
        found[name] = train(CASES[name], activations(), strategy=strategy, devices=4)
    for name in STREAMED:
        at = folder / "grid" / name
        toy_run(at / "stopped", 4, parts=2, devices=4)
        resumed, whole = (
            toy_run(at / run, 8, parts=2, devices=4)["state"] for run in ("stopped", "whole")
        )
        found[f"streamed-{name}"] = {"resumed": resumed, "whole": whole}
    return found
