"""Rows from files beside rows in memory: `python -m benchmarks.cache`.

Batches are taken in random order from the same rows: in a tensor, by indexing; and in safetensors
files that lie in the page cache, by `CachedDataModule`, shuffled singly and in pieces. They are
read alone, and in a run of a TopK SAE. All take turns, so that what else the machine does meets
all of them; the median of the turns counts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.command_line import say
from lightning_sae import CachedDataModule, TopKSAE

WARM_UP = 5


class InMemory:
    """Batches of a tensor's rows, in a new order for each pass."""

    def __init__(self, rows: Tensor, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.rows))
            for picked in order.split(self.batch_size):
                if len(picked) == self.batch_size:
                    yield self.rows[picked].float()


def read(batches: Any, n: int) -> float:
    """Rows per second of `n` batches, which nobody uses."""
    it = iter(batches)
    for _ in islice(it, WARM_UP):
        pass
    started = time.perf_counter()
    rows = sum(len(batch) for batch in islice(it, n))
    return rows / (time.perf_counter() - started)


def fit(batches: Any, n: int, width: int, d_sae: int) -> float:
    """Rows per second of a run of `n` steps, its start left out."""
    times: list[float] = []
    sae = TopKSAE(width, d_sae, k=32)
    timed = _Timed(batches, times)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {**dict.fromkeys(silent, False), "limit_val_batches": 0}
    Trainer(accelerator="cpu", max_steps=n + WARM_UP, **settings).fit(sae, timed)
    return batches.batch_size * (len(times) - WARM_UP - 1) / (times[-1] - times[WARM_UP])


class _Timed:
    """Notes when each batch is asked for."""

    def __init__(self, batches: Any, times: list[float]) -> None:
        self.batches, self.times = batches, times

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            self.times.append(time.perf_counter())
            yield batch


def measure(given: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """For each source, rows per second read and trained on, in each turn."""
    rows = torch.randn(given.rows, given.width, dtype=getattr(torch, given.dtype))
    for number, part in enumerate(rows.split(-(-given.rows // given.shards))):
        save_file({"rows": part.clone()}, folder / f"{number:03d}.safetensors")
    size = given.batch_size

    def files(together: int) -> Any:
        data = CachedDataModule(
            folder, batch_size=size, validation_fraction=0.0, rows_together=together
        )
        return data.train_dataloader()

    sources: dict[str, Callable[[], Any]] = {
        "rows in memory": lambda: InMemory(rows, size),
        "files, shuffled singly": lambda: files(1),
        "files, in pieces of 16 rows": lambda: files(16),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for _ in range(given.turns):
        for name, made in sources.items():
            batches = made()
            pair = read(batches, given.batches), fit(batches, given.steps, given.width, given.d_sae)
            found[name].append(pair)
            if isinstance(batches, InMemory):
                continue
            batches.close()
    return found


def main(args: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--d_sae", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=500, help="batches read in a turn")
    parser.add_argument("--steps", type=int, default=100, help="steps of a run in a turn")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given, Path(folder))
    say(f"{given.rows:,} rows of width {given.width}, {given.dtype}; rows per second, median")
    say(f"{'':<30}{'read':>14}{'':>8}{'trained on':>14}")
    base = [median(each) for each in zip(*found["rows in memory"], strict=True)]
    for name, turns in found.items():
        rates = [median(each) for each in zip(*turns, strict=True)]
        columns = "".join(f"{r:>14,.0f}{r / b:>7.0%} " for r, b in zip(rates, base, strict=True))
        say(f"{name:<30}{columns}")


if __name__ == "__main__":
    main()
