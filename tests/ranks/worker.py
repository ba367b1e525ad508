"""One of two ranks: `python -m tests.ranks.worker FOLDER`, with the environment of a launcher.

All that needs two ranks and ends well is done by one pair of processes, for starting one is what
takes long.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sae import CachedDataModule, ReLUSAE, write_cache
from lightning_sae.analysis.analyze import analyze
from lightning_sae.cli import main as lightning_sae
from tests.ranks.cases import BATCH, CACHED, CASES, activations, to_analyze, to_cache, train
from tests.ranks.command import resumable

RANKS = {"strategy": "ddp", "devices": 2}


class Unsized(IterableDataset):  # type: ignore[type-arg]
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches: Tensor) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches


def agree(rank: int) -> dict[str, Any]:
    """Every architecture on this rank's half of each batch."""
    half = BATCH // 2
    batches = activations()[:, rank * half : (rank + 1) * half]
    return {name: train(case, batches, **RANKS) for name, case in CASES.items()}


def end_early(rank: int) -> dict[str, Any]:
    """Steps taken, and weights, where one rank has 3 batches and the other 6."""
    batches = torch.randn(3 + 3 * rank, 4, 8, generator=torch.Generator().manual_seed(rank))
    loaders: dict[str, Any] = {
        "sized": DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        "unsized": DataLoader(Unsized(batches), batch_size=None),
    }
    held_out = DataLoader(torch.zeros(2, 4, 8), batch_size=None)  # type: ignore[arg-type, var-annotated]
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {**dict.fromkeys(silent, False), **RANKS, "max_epochs": 2}
    settings |= {"accelerator": "cpu", "use_distributed_sampler": False}
    found: dict[str, Any] = {}
    for name, loader in loaders.items():
        for accumulated in (1, 2):
            sae = ReLUSAE(8, 16, decoder_norm="free", lr=0.01)
            trainer = Trainer(**settings, accumulate_grad_batches=accumulated)
            trainer.fit(sae, loader, held_out)
            found[f"{name}-{accumulated}"] = (trainer.global_step, sae.W_dec.detach())
    return found


def go_on(folder: Path) -> dict[str, Any]:
    """Runs that were killed, gone on with and tested; what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("whole", "killed", "bare"):
            arguments = ["--config", str(folder / f"{name}.yaml")]
            last = folder / name / "checkpoints" / "last.ckpt"
            lightning_sae(["fit", *arguments, *resumable(last)])
            if name == "whole":
                lightning_sae(["test", *arguments, "--ckpt_path", str(last)])
            caught.append(name)  # type: ignore[arg-type]
    return {"warned": [str(getattr(each, "message", each)) for each in caught]}


class Kept(ReLUSAE):
    """Keeps the batches it is trained on."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        vars(self).setdefault("batches", []).append(batch)


def cache(folder: Path) -> dict[str, Any]:
    """The batches of a run on a cache that both ranks wrote."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    data = to_cache(folder)
    write_cache(data, folder / "cache", **CACHED, fabric=fabric)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {**dict.fromkeys(silent, False), **RANKS, "limit_val_batches": 0}
    sae = Kept(128, 16)
    Trainer(accelerator="cpu", max_steps=20, **settings).fit(
        sae, CachedDataModule(folder / "cache", batch_size=16, buffer_size=32)
    )
    return {"batches": torch.cat(vars(sae)["batches"])}


def analyze_text(folder: Path) -> None:
    """Analyze an SAE as `lightning-sae analyze --devices 2` does."""
    sae, output = to_analyze(folder), folder / "analysis"
    analyze(str(sae), str(output), tokens=4096, accelerator="cpu", devices=2)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    results = {"agree": agree(rank), "end_early": end_early(rank), "go_on": go_on(folder)}
    results["cache"] = cache(folder)
    analyze_text(folder)
    torch.save(results, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
