"""What a planned run costs on this machine: time by stage, memory, the stream, hours."""

import json
import logging
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.bench.fits import (
    WARM_UP,
    Repeated,
    StepClock,
    batches_of_two_refills,
    fit,
    hold_still,
    machine,
    median_seconds,
    norm_callbacks,
    read_stream,
    set_l0,
    sizes,
    tell,
)
from lightning_sae.bench.members import measure_members
from lightning_sae.bench.report import Report
from lightning_sae.callbacks.results import unused
from lightning_sae.files import write_atomically
from lightning_sae.functional.sparse.code import pre_activations
from lightning_sae.side_by_side import SideBySide
from lightning_sae.training.optimizer import MemoryOrderAdam


class BenchTrainer(Trainer):
    """Lightning's trainer with a method that measures a planned run."""

    bench_report: Report

    def bench(
        self,
        model: SparseAutoencoder | SideBySide,
        datamodule: LightningDataModule,
        l0: float = 64.0,
        steps: int = 30,
        output: str | None = None,
    ) -> None:
        """Measure a training step by stage, its floor, memory and the stream on this machine.

        Nothing is trained: the SAE has random weights, and biases that give the requested L0. The
        predicted duration is that of `fit` with the same arguments and `trainer.max_steps` steps.
        For several SAEs side by side, time and memory are measured for each SAE and for the stream
        that they share. Callbacks are left out, except `DecoderNormProjection`.

        Args:
            model: The SAE, or several side by side.
            datamodule: Its data.
            l0: Active latents per activation; ignored by an SAE that fixes their number.
            steps: Steps to measure.
            output: JSON file of the figures; by default `bench.json` in
                `trainer.default_root_dir`. An existing file is kept, and another name is chosen.
        """
        max_steps, root = self.max_steps, self.default_root_dir
        log = logging.getLogger("lightning.pytorch")  # it would report each short fit
        level = log.level
        log.setLevel(logging.WARNING)
        try:
            report = (
                measure_members(self, model, datamodule, l0, steps)
                if isinstance(model, SideBySide)
                else measure(self, model, datamodule, l0, steps)
            )
        finally:
            log.setLevel(level)
        report.predict(max_steps)
        path = unused(Path(output) if output else Path(root) / "bench.json")
        text = json.dumps(report.figures, indent=2)
        write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))
        report.path = path
        self.bench_report = report


def measure(
    trainer: Trainer, sae: SparseAutoencoder, data: LightningDataModule, l0: float, steps: int
) -> Report:
    """Measure one SAE; see `BenchTrainer.bench`."""
    device, norm = trainer.strategy.root_device, norm_callbacks(sae)
    hold_still(sae)
    cycle = batches_of_two_refills(data, steps)
    tell("the stream")
    fit(trainer, sae, 1, datamodule=data, callbacks=norm)  # it adopts the data's scaling and mean
    batches, stream = read_stream(data, cycle)
    inputs = [batch.to(device) for batch in batches]
    sae.to(device)
    reached = set_l0(sae, inputs, l0)
    product, floor = _floor(sae, inputs[0], steps)
    clock = StepClock(device.type)
    tell(f"{steps} steps of training")
    fit(trainer, sae, steps + WARM_UP, Repeated(batches), callbacks=[*norm, clock])
    run = StepClock(device.type)
    tell("both together")
    fit(trainer, sae, cycle + WARM_UP, datamodule=data, callbacks=[*norm, run])
    n, stages = len(inputs[0]), clock.stages()
    return Report(
        {
            "architecture": type(sae).__name__,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "batch_size": n,
            "l0": reached,
            **stages,
            "product_seconds": product,
            "floor_seconds": floor,
            "training_activations_per_second": n / stages["step_seconds"],
            "stream_activations_per_second": stream,
            "together_activations_per_second": n / run.seconds_per_batch(),
            **sizes(sae, data, device),
            **machine(device),
        }
    )


@torch.no_grad()
def _floor(sae: SparseAutoencoder, x: Tensor, n: int) -> tuple[float, float]:
    """Seconds of the encoder's product alone, and with a step of fused Adam."""
    W_enc, W_dec = (w.detach().clone().requires_grad_() for w in (sae.W_enc, sae.W_dec))
    optimizer = MemoryOrderAdam([W_enc, W_dec], lr=1e-30, fused=True)
    W_enc.grad, W_dec.grad = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
    out = x.new_empty(len(x), sae.d_sae)
    product = median_seconds(lambda: pre_activations(x, W_enc, sae.b_enc, out=out), n, x.device)
    return product, product + median_seconds(optimizer.step, n, x.device)
