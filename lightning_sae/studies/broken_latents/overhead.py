"""Lightning's share of a training step: the Trainer compared with a plain loop."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from typing_extensions import override

from lightning_sae.architectures import ReLUSAE
from lightning_sae.architectures.objective import at_once
from lightning_sae.callbacks import DecoderNormProjection
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.broken_latents.settings import BATCH_SIZE, TIED, Variant
from lightning_sae.studies.broken_latents.train import ExperimentRun
from lightning_sae.studies.shared.toy_training import train_on_toy
from lightning_sae.training.finite import require_finite
from lightning_sae.training.optimizer import MemoryOrderAdam, clip_norm

UNTIMED = 50  # first steps, in which memory is allocated and threads start


def overhead(run: ExperimentRun, steps: int = 200, rounds: int = 5) -> dict[str, float]:
    """Processor time of a step by the Trainer and in a plain loop, in microseconds.

    Both draw the same activations and do all the work of a step: objective, check of the loss,
    counts of silent latents, gradient, projection, clipping, Adam, rows back to norm 1. The
    difference is Lightning's.

    Args:
        run: Gives world and size; the SAE is tied, with unit rows and without the auxiliary loss.
        steps: Steps that are timed in each round.
        rounds: Times that each way is timed in turn. The least mean counts, since other work on
            the machine only adds to it.

    Returns:
        `trainer_microseconds`, `plain_microseconds`, and `share_of_lightning`, 1 - plain / trainer.
    """
    variant = Variant(TIED, reported="", checks=())
    samples = (UNTIMED + steps) * BATCH_SIZE
    short = ExperimentRun(run.experiment, variant, run.seed, samples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the study's runs
    try:
        times = [
            [_microseconds(way, short) for way in (by_trainer, in_plain_loop)]
            for _ in range(rounds)
        ]
    finally:
        torch.set_num_threads(threads)
    ours, plain = (min(of_one) for of_one in zip(*times, strict=True))
    return {
        "trainer_microseconds": round(ours),
        "plain_microseconds": round(plain),
        "share_of_lightning": round(1 - plain / ours, 3),
    }


def _microseconds(
    way: Callable[[ExperimentRun, ReLUSAE, ToyDataModule], list[float]], run: ExperimentRun
) -> float:
    world = run.world()
    times = way(run, run.sae(world.d_in), world)
    return 1e6 * (times[-1] - times[UNTIMED - 1]) / (len(times) - UNTIMED)


class _Clock(Callback):
    """Notes the processor time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.process_time())


def by_trainer(run: ExperimentRun, sae: ReLUSAE, world: ToyDataModule) -> list[float]:
    """Train with a Trainer; return the processor time in seconds at the end of each step."""
    clock = _Clock()
    train_on_toy(sae, world, run.steps, [*run.callbacks(), clock])
    return clock.times


def in_plain_loop(run: ExperimentRun, sae: ReLUSAE, world: ToyDataModule) -> list[float]:
    """The same steps in a plain loop."""
    optimizer = MemoryOrderAdam(sae.parameters(), lr=sae.lr, betas=sae.betas, fused=True)
    projection = DecoderNormProjection()
    stream, times = iter(world.train_dataloader()), []
    for step in range(run.steps):
        batch = next(stream)
        x = sae.scaled(batch)
        outcome = at_once(sae.objective, x)
        require_finite(outcome.loss, outcome.losses, x, sae, step, sae.ranks)
        sae.count_silence(outcome.fired, len(batch))
        optimizer.zero_grad()
        outcome.loss.backward()
        assert sae.W_dec.grad is not None
        projection.project(sae.W_dec.grad, sae.W_dec)
        clip_norm(optimizer, sae.clip_grad_norm or math.inf)
        optimizer.step()
        projection.renormalise(sae.W_dec)
        times.append(time.process_time())
    return times
