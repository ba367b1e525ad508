"""What a rank draws, reads and allocates for its part of a large dictionary."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_sae import SplitDictionary, TopKSAE, tensors
from lightning_sae.architectures import base, initial
from lightning_sae.callbacks import RunCheckpoint
from lightning_sae.functional import directions
from lightning_sae.functional.directions import RandomUnitRows
from tests.ranks.cases import activations, train
from tests.ranks.split_cases import SILENT, SPLIT

WIDTH, LATENTS, PIECE = 64, 2**15, 2**14
MATRIX = 4 * WIDTH * LATENTS  # bytes
LATER = ("topk", "tied", "gated", "jumprelu", "batch-topk", "matryoshka-drawn")


@contextmanager
def large(piece: int = 128) -> Iterator[list[int]]:
    """Initialises every dictionary lazily, and records how many latents are drawn."""
    drawn: list[int] = []
    draw = RandomUnitRows.draw

    def noted(self: RandomUnitRows, wanted: range) -> Any:
        drawn.append(len(wanted))
        return draw(self, wanted)

    with ExitStack() as patches:
        patches.enter_context(patch.object(RandomUnitRows, "draw", noted))
        patches.enter_context(patch.object(initial, "LARGE", 0))
        patches.enter_context(patch.object(directions, "PIECE", piece))
        patches.enter_context(patch.object(tensors, "PIECE", piece))
        patches.enter_context(patch.object(base, "keep_freed_blocks"))  # which allocates 32 MB
        yield drawn


def drawn_later() -> dict[str, Any]:
    """Runs whose dictionary is drawn in parts, and the numbers of latents drawn."""
    with large() as drawn:
        strategies = {name: SplitDictionary() for name in LATER}
        found = {
            name: train(SPLIT[name], activations(), strategy=strategy, devices=2)
            for name, strategy in strategies.items()
        }
    return {"runs": found, "drawn": drawn}


def peaks(folder: Path) -> dict[str, int]:
    """Peak bytes of tensors in a new run and in a resumed run."""
    with large(PIECE):
        run(folder, steps=1)  # leaves a checkpoint
        size = (folder / "checkpoints" / "last.ckpt").stat().st_size
        return {
            "started": most_bytes(lambda: run(folder / "new", steps=0)),
            "resumed": most_bytes(lambda: run(folder, steps=1), mapped=size),
        }


def run(folder: Path, steps: int) -> None:
    """Build an SAE and train it, or go on from the checkpoint that is there."""
    torch.manual_seed(0)
    sae = TopKSAE(WIDTH, LATENTS, k=4)
    settings = {**SILENT, "enable_checkpointing": True, "accelerator": "cpu", "devices": 2}
    trainer = Trainer(
        strategy=SplitDictionary(),
        max_steps=steps,
        default_root_dir=folder,
        callbacks=RunCheckpoint(),
        **settings,
    )
    last = folder / "checkpoints" / "last.ckpt"
    rows: Any = DataLoader(torch.randn(4, 8, WIDTH), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(sae, rows, ckpt_path=last if last.exists() else None)


def most_bytes(work: Callable[[], Any], mapped: int = 0) -> int:
    """The most bytes that are allocated at a time for tensors, those inside operators too.

    A file of `mapped` bytes is reported when it is mapped, which takes no memory.
    """
    gc.collect()  # so that nothing of before is freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes = [(at, change) for at, change in changes if abs(change) != mapped]
    now = most = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        now += change
        most = max(most, now)
    return most
