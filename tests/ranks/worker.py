"""What one of two ranks does. All that ends well is done by one pair of processes."""

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
from lightning_sae.cli import command
from lightning_sae.cli import main as lightning_sae
from tests.ranks.cases import (
    BATCH,
    CACHED,
    CASES,
    QUIET,
    activations,
    to_analyze,
    to_cache,
    train,
)
from tests.ranks.command import resumable
from tests.ranks.layouts import fit_layouts
from tests.ranks.side_by_side import fit_side_by_side

RANKS = {"strategy": "ddp", "devices": 2}


class Unsized(IterableDataset):  # type: ignore[type-arg]
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches: Tensor) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches


def own_half(rank: int) -> Tensor:
    """This rank's half of each batch."""
    half = BATCH // 2
    return activations()[:, rank * half : (rank + 1) * half]


def agree(rank: int) -> dict[str, Any]:
    """Every architecture on this rank's half of each batch."""
    return {name: train(case, own_half(rank), **RANKS) for name, case in CASES.items()}


def end_early(rank: int) -> dict[str, Any]:
    """Steps taken, and weights, where one rank has 3 batches and the other 6."""
    batches = torch.randn(3 + 3 * rank, 4, 8, generator=torch.Generator().manual_seed(rank))
    loaders: dict[str, Any] = {
        "sized": DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        "unsized": DataLoader(Unsized(batches), batch_size=None),
    }
    held_out = DataLoader(torch.zeros(2, 4, 8), batch_size=None)  # type: ignore[arg-type, var-annotated]
    settings: dict[str, Any] = {**QUIET, **RANKS, "max_epochs": 2}
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


def differ(rank: int, folder: Path) -> str:
    """The refusal of a run whose configuration is another on each rank."""
    config = ["--config", str(folder / "different.yaml")]
    try:
        lightning_sae(["fit", *config, f"--model.lr={(0.003, 0.004)[rank]}"])
    except ValueError as error:
        return str(error)
    return ""


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
    settings: dict[str, Any] = {**QUIET, **RANKS, "limit_val_batches": 0}
    sae = Kept(128, 16)
    Trainer(max_steps=20, **settings).fit(
        sae, CachedDataModule(folder / "cache", batch_size=16, buffer_size=32)
    )
    return {"batches": torch.cat(vars(sae)["batches"])}


def analyze_text(folder: Path) -> None:
    """Analyze an SAE as `lightning-sae analyze --devices 2` does."""
    sae, output = to_analyze(folder), folder / "analysis"
    analyze(str(sae), str(output), tokens=4096, accelerator="cpu", devices=2)


def fit_killed(rank: int, folder: Path) -> None:
    """`lightning-sae fit` of a run in which a rank is killed."""
    sys.argv = ["lightning-sae", "fit", "--config", str(folder / "killed.yaml")]
    command()


def of_rank(rank: int, folder: Path) -> dict[str, Any]:
    """All that ends well."""
    warnings.simplefilter("ignore")
    results = {
        "agree": agree(rank),
        "side_by_side": fit_side_by_side(rank, own_half(rank), **RANKS),
        "layouts": fit_layouts(rank),
        "end_early": end_early(rank),
        "different": differ(rank, folder),
        "go_on": go_on(folder),
        "cache": cache(folder),
    }
    analyze_text(folder)
    return results
