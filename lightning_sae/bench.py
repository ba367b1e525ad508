"""What a planned run costs on this machine: time by stage, memory, the stream, hours."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.architectures.optimisation import MemoryOrderAdam
from lightning_sae.bench_report import Report
from lightning_sae.callbacks import DecoderNormProjection
from lightning_sae.callbacks.results import unused
from lightning_sae.functional.codes import pre_activations
from lightning_sae.memory import peak_memory
from lightning_sae.saving import write_atomically
from lightning_sae.version import __version__

WARM_UP = 5


class BenchTrainer(Trainer):
    """Lightning's trainer with one more thing to do: measure."""

    bench_report: Report

    def bench(
        self,
        model: SparseAutoencoder,
        datamodule: LightningDataModule,
        l0: float = 64.0,
        steps: int = 30,
        output: str | None = None,
    ) -> None:
        """Measure a training step by stage, its floor, memory and the stream on this machine.

        Nothing is trained: the SAE has random weights, and biases that give the L0 asked for. The
        run that is predicted is the one `fit` would do with the same arguments, of
        `trainer.max_steps` steps.

        Args:
            model: The SAE.
            datamodule: Its data.
            l0: Active latents per activation; an SAE that fixes their number has its own.
            steps: Steps to measure.
            output: JSON file of the figures; `bench.json` in `trainer.default_root_dir` by
                default. An existing file is kept, and another name found.
        """
        max_steps, root = self.max_steps, self.default_root_dir
        report = measure(self, model, datamodule, l0, steps)
        report.predict(max_steps)
        path = unused(Path(output) if output else Path(root) / "bench.json")
        text = json.dumps(report.figures, indent=2)
        write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))
        report.path = path
        self.bench_report = report


class StepClock(Callback):
    """Times of each step's stages."""

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator
        self.times: list[list[float]] = []

    def _now(self) -> None:
        if self.accelerator == "cuda":
            torch.cuda.synchronize()
        self.times[-1].append(time.perf_counter())

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
        if not hasattr(self, "_handle"):  # the optimiser's step ends when its last hook has run
            self._handle = optimizer.register_step_post_hook(lambda *_: self._now())

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._now()

    def stages(self) -> dict[str, float]:
        """Median of each stage after the warm-up, in seconds."""
        kept = [t for t in self.times[WARM_UP:] if len(t) == 5]
        names = ("forward", "backward", "optimiser", "rest")
        spans = [[b - a for a, b in pairwise(t)] for t in kept]
        by_stage = zip(names, zip(*spans, strict=True), strict=True)
        return {
            **{f"{name}_seconds": median(values) for name, values in by_stage},
            "step_seconds": median(t[-1] - t[0] for t in kept),
        }

    def seconds_per_batch(self) -> float:
        """From the start of one step to the start of the next, reading included."""
        starts = [t[0] for t in self.times[WARM_UP:]]
        return (starts[-1] - starts[0]) / (len(starts) - 1)


class Repeated:
    """Some batches over and over."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from self.batches


def measure(
    trainer: Trainer, sae: SparseAutoencoder, data: LightningDataModule, l0: float, steps: int
) -> Report:
    """Measure everything; see `BenchTrainer.bench`."""
    log = logging.getLogger("lightning.pytorch")  # it would tell of each short fit
    log.setLevel(logging.WARNING)
    device = trainer.strategy.root_device
    sae.lr, sae.lr_warmup_steps, sae.lr_decay_steps = 1e-30, 0, 0  # weights stay as they are
    cycle = _batches_of_two_refills(data, steps)
    _tell("the stream")
    _fit(trainer, sae, 1, datamodule=data)  # the SAE adopts the data's scaling and mean
    batches, stream = _stream(data, cycle)
    inputs = [batch.to(device) for batch in batches]
    sae.to(device)
    reached = _set_l0(sae, inputs, l0)
    product, floor = _floor(sae, inputs[0], steps)
    clock = StepClock(device.type)
    _tell(f"{steps} steps of training")
    _fit(trainer, sae, steps + WARM_UP, Repeated(batches), callbacks=[clock])
    run = StepClock(device.type)
    _tell("both together")
    _fit(trainer, sae, cycle + WARM_UP, datamodule=data, callbacks=[run])
    n, stages = len(inputs[0]), clock.stages()
    weights = sum(p.numel() * p.element_size() for p in sae.parameters())
    buffer = _buffer_bytes(data)
    saved = buffer if buffer <= getattr(data, "largest_saved_buffer", 0) else 0
    return Report(
        {
            "architecture": type(sae).__name__,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "batch_size": n,
            "l0": reached,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            **stages,
            "product_seconds": product,
            "floor_seconds": floor,
            "training_activations_per_second": n / stages["step_seconds"],
            "stream_activations_per_second": stream,
            "together_activations_per_second": n / run.seconds_per_batch(),
            "state_bytes": 4 * weights,
            "buffer_bytes": buffer,
            "checkpoint_bytes": 3 * weights + saved,
            "peak_bytes": _peak_bytes(device),
            "versions": {"lightning_sae": __version__, "torch": torch.__version__},
        }
    )


def _tell(what: str) -> None:
    sys.stderr.write(f"measuring {what}\n")


def _fit(
    like: Trainer,
    sae: SparseAutoencoder,
    steps: int,
    batches: Repeated | None = None,
    datamodule: LightningDataModule | None = None,
    callbacks: list[Callback] | None = None,
) -> None:
    """Train on the device of `like`, in its precision, and leave nothing behind."""
    norm = [DecoderNormProjection()] if sae.decoder_norm == "unit" else []
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
        callbacks=[*norm, *(callbacks or [])],
    )
    loader = cast(Any, batches)
    trainer.fit(sae, loader, loader, datamodule=datamodule)


def _batches_of_two_refills(data: Any, at_least: int) -> int:
    """Batches in whole cycles of the buffer, for a refill comes all at once."""
    if not hasattr(data, "buffer_size"):
        return at_least
    served = int(data.refill_fraction * data.buffer_size / data.batch_size)
    return max(2 * served, served * (at_least // max(1, served)))


def _stream(data: Any, n: int) -> tuple[list[Tensor], float]:
    """A few batches, and the activations per second of the next n."""
    loader = iter(data.train_dataloader())
    kept = [batch.clone() for batch in islice(loader, 4)]
    started = time.perf_counter()
    count = sum(len(batch) for batch in islice(loader, n))
    rate = count / (time.perf_counter() - started)
    data.teardown("fit")
    return kept, rate


@torch.no_grad()
def _set_l0(sae: SparseAutoencoder, batches: list[Tensor], l0: float) -> float:
    """Move all encoder biases so that so many latents are active on average, if biases do it."""
    pre = sae.pre_activations(sae.scaled(batches[0]))
    wanted = min(len(pre) * round(l0), pre.numel())
    sae.b_enc -= pre.flatten().topk(wanted, sorted=False).values.min()
    sae.layout.dense = wanted > 0.25 * pre.numel()
    counts = [(sae.encode(batch) != 0).sum().item() / len(batch) for batch in batches]
    return sum(counts) / len(counts)


@torch.no_grad()
def _floor(sae: SparseAutoencoder, x: Tensor, n: int) -> tuple[float, float]:
    """Seconds of the encoder's product alone, and of it with a step of fused Adam."""
    W_enc, W_dec = (w.detach().clone().requires_grad_() for w in (sae.W_enc, sae.W_dec))
    optimizer = MemoryOrderAdam([W_enc, W_dec], lr=1e-30, fused=True)
    W_enc.grad, W_dec.grad = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
    out = x.new_empty(len(x), sae.d_sae)
    product = _median_seconds(lambda: pre_activations(x, W_enc, sae.b_enc, out=out), n, x.device)
    return product, product + _median_seconds(optimizer.step, n, x.device)


def _median_seconds(call: Callable[[], Any], n: int, device: torch.device) -> float:
    times = []
    for _ in range(n + 2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[2:])


def _buffer_bytes(data: Any) -> int:
    if not hasattr(data, "buffer_size"):
        return 0
    return int(data.buffer_size * data.d_in * data.dtype.itemsize)


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
