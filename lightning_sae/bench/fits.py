"""Parts of the measurements of `lightning-sae bench`: short fits, clocks and sizes."""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.callbacks import DecoderNormProjection
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.loaders import Rows
from lightning_sae.data.source import activations_in
from lightning_sae.version import __version__

WARM_UP = 5
"""Steps before those that are timed."""


class StepClock(Callback):
    """Records the time at the stages of each training step."""

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator
        self.times: list[list[float]] = []

    def _now(self) -> None:
        self.times[-1].append(now(self.accelerator))

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append([])
        self._now()

    @override
    def on_before_backward(self, *_: Any) -> None:
        self._now()

    @override
    def on_after_backward(self, *_: Any) -> None:
        self._now()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if not hasattr(self, "_handle"):  # the step ends when its last hook has run
            self._handle = optimizer.register_step_post_hook(lambda *_: self._now())

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._now()

    def stages(self) -> dict[str, float]:
        """Median of each stage after the warm-up, in seconds."""
        kept = [t for t in self.times[WARM_UP:] if len(t) == 5]
        names = ("forward", "backward", "optimizer", "rest")
        spans = [[b - a for a, b in pairwise(t)] for t in kept]
        by_stage = zip(names, zip(*spans, strict=True), strict=True)
        return {
            **{f"{name}_seconds": median(values) for name, values in by_stage},
            "step_seconds": median(t[-1] - t[0] for t in kept),
        }

    def from_start_to_start(self) -> list[float]:
        """Seconds from the start of each step after the warm-up to that of the next."""
        return [after[0] - before[0] for before, after in pairwise(self.times[WARM_UP:])]

    def seconds_per_batch(self) -> float:
        """Mean seconds from the start of one step to that of the next, data loading included."""
        spans = self.from_start_to_start()
        return sum(spans) / len(spans)


class Repeated:
    """Repeats some batches endlessly."""

    def __init__(self, batches: list[Rows]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Rows]:
        while True:
            yield from self.batches


def now(accelerator: str) -> float:
    """Current time in seconds, after synchronizing the device."""
    if accelerator == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tell(what: str) -> None:
    """Write to standard error what is being measured."""
    sys.stderr.write(f"measuring {what}\n")


def hold_still(sae: SparseAutoencoder) -> None:
    """Make training leave the weights unchanged."""
    sae.lr, sae.lr_warmup_steps, sae.lr_decay_steps = 1e-30, 0, 0


def norm_callbacks(sae: SparseAutoencoder) -> list[Callback]:
    """The callbacks that a training step of the SAE needs."""
    return [DecoderNormProjection()] if sae.decoder_norm == "unit" else []


def fit(
    like: Trainer,
    model: LightningModule,
    steps: int,
    batches: Repeated | None = None,
    datamodule: LightningDataModule | None = None,
    callbacks: list[Callback] | None = None,
) -> None:
    """Train on the device and in the precision of the trainer `like`, without writing files."""
    trainer = Trainer(
        accelerator="auto" if like.strategy.root_device.type == "cuda" else "cpu",
        devices=1,
        precision=like.precision,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    loader = cast(Any, batches)
    trainer.fit(model, loader, loader, datamodule=datamodule)


def batches_of_two_refills(data: Any, at_least: int) -> int:
    """Number of batches in whole cycles of the buffer, because each refill is one burst."""
    if not isinstance(data, ActivationDataModule):
        return at_least
    served = int(data.refill_fraction * data.buffer_size / data.batch_size)
    return max(2 * served, served * (at_least // max(1, served)))


def read_stream(data: Any, n: int) -> tuple[list[Rows], float]:
    """A few batches, and the activations per second of the next n."""
    loader = iter(data.train_dataloader())
    kept = [_copy(batch) for batch in islice(loader, 4)]
    started = time.perf_counter()
    count = sum(activations_in(batch) for batch in islice(loader, n))
    rate = count / (time.perf_counter() - started)
    data.teardown("fit")
    return kept, rate


def _copy(batch: Rows) -> Rows:
    if isinstance(batch, dict):
        return {name: rows.clone() for name, rows in batch.items()}
    return batch.clone()


@torch.no_grad()
def set_l0(sae: SparseAutoencoder, batches: list[Tensor], l0: float) -> float:
    """Shift all encoder biases so that `l0` latents are active on average.

    Returns:
        The L0 reached, which differs where an architecture fixes it.
    """
    pre = sae.pre_activations(sae.scaled(batches[0]))
    wanted = min(len(pre) * round(l0), pre.numel())
    sae.b_enc -= pre.flatten().topk(wanted, sorted=False).values.min()
    sae.layout.dense = wanted > 0.25 * pre.numel()
    counts = [(sae.encode(batch) != 0).sum().item() / len(batch) for batch in batches]
    return sum(counts) / len(counts)


@torch.no_grad()
def language_model_seconds(data: Any, passes: int = 8) -> float | None:
    """Seconds of the language model per activation that passes the filter.

    The model runs up to the deepest hook, on tokens already read. None without a language model.
    """
    if not isinstance(data, ActivationDataModule):
        return None
    blocks, model = data.training_blocks(), data.language_model
    tokens = [blocks.read(data.blocks_per_pass) for _ in range(passes)]
    turns = cycle(tokens)
    seconds = median_seconds(lambda: model.activations(next(turns)), passes, model.device)
    kept = sum(data.filter.kept(each, model.activations(each)).sum().item() for each in tokens)
    return seconds / (kept / passes)


def median_seconds(call: Callable[[], Any], n: int, device: torch.device) -> float:
    """Median time of a call, after two warm-up calls."""
    times = []
    for _ in range(n + 2):
        started = time.perf_counter()
        call()
        times.append(now(device.type) - started)
    return median(times[2:])


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def sizes(model: nn.Module, data: Any, device: torch.device) -> dict[str, int | None]:
    """Bytes of a run's state, buffer and checkpoint, and the peak memory of this process."""
    weights, (buffer, saved) = weight_bytes(model), _buffer_bytes(data)
    return {
        "state_bytes": 4 * weights,
        "buffer_bytes": buffer,
        "checkpoint_bytes": 3 * weights + saved,
        "peak_bytes": _peak_bytes(device),
    }


def _buffer_bytes(data: Any) -> tuple[int, int]:
    """Bytes of the buffer in memory and in a checkpoint."""
    if not isinstance(data, ActivationDataModule):
        return 0, 0
    buffer = data.buffer_size * data.language_model.width() * data.dtype.itemsize
    return buffer, buffer if buffer <= data.largest_saved_buffer else 0


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and versions that the figures are for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"lightning_sae": __version__, "torch": torch.__version__}
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None where /proc does not exist."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
