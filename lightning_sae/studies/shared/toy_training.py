"""One SAE of an experiment, trained by a Trainer that is stripped to what so small an SAE needs."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.architectures import ReLUSAE, TiedSAE
from lightning_sae.callbacks import AuxThresholdWarmup, DecoderNormProjection
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.broken_latents.experiments import (
    BATCH_SIZE,
    OPTIMISATION,
    Experiment,
    Variant,
)

Report = Callable[[int], None]
"""Is told how many activations more were trained on."""


@dataclass(frozen=True)
class Run:
    """One SAE to train.

    Attributes:
        experiment: Its world.
        variant: Its kind.
        seed: Of the world, its samples and the SAE's first weights.
        samples: Activations to train on.
        output: Folder of the study.
    """

    experiment: Experiment
    variant: Variant
    seed: int
    samples: int
    output: Path

    @property
    def name(self) -> str:
        """For its folder."""
        variant = "".join(c if c.isalnum() else "-" for c in self.variant.name)
        while "--" in variant:
            variant = variant.replace("--", "-")
        return f"{self.experiment.number}-{variant}-seed-{self.seed}"

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        return -(-self.samples // BATCH_SIZE)

    def world(self) -> ToyDataModule:
        """The world, with the variant's changes."""
        arguments = self.experiment.world | self.variant.world
        return ToyDataModule(**arguments, batch_size=BATCH_SIZE, seed=self.seed)

    def sae(self, d_in: int) -> ReLUSAE:
        """The SAE before training."""
        kind = TiedSAE if self.variant.tied else ReLUSAE
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return kind(
                d_in,
                self.experiment.d_sae,
                self.experiment.l1_coefficient,
                **(OPTIMISATION | self.variant.sae),
            )

    def callbacks(self) -> list[Callback]:
        """Unit decoder rows; a third of the run each for the delay and the rise of the loss."""
        found: list[Callback] = [DecoderNormProjection()]
        if self.variant.has_loss:
            found.append(AuxThresholdWarmup(self.steps // 3, max(1, self.steps // 3)))
        return found


class Progress(Callback):
    """Tells from time to time how many activations more were trained on.

    Args:
        report: Is told.
        every: Steps between two reports.
    """

    def __init__(self, report: Report, every: int = 100) -> None:
        self.report, self.every = report, every

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.report(self.every * len(batch))


@dataclass(frozen=True)
class Trained:
    """An SAE and where it comes from.

    Attributes:
        sae: The SAE.
        world: What it was trained on.
        seconds: How long that took.
    """

    sae: ReLUSAE
    world: ToyDataModule
    seconds: float


def train(run: Run, report: Report) -> Trained:
    """Train the SAE of a run."""
    world = run.world()
    sae = run.sae(world.d_in)
    began = time.perf_counter()
    fit(run, sae, world, [Progress(report)])
    return Trained(sae.eval(), world, time.perf_counter() - began)


def fit(run: Run, sae: ReLUSAE, world: ToyDataModule, watching: Sequence[Callback]) -> None:
    """Train an SAE as a run asks for.

    `barebones` leaves out all logging: at this size a step's calls of `self.log` cost more than the
    step, and nobody reads them.
    """
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            barebones=True,
            max_steps=run.steps,
            limit_val_batches=0,
            callbacks=[*run.callbacks(), *watching],
        )
        trainer.fit(sae, datamodule=world)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning from announcing each run, and what it leaves out."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", "GPU available but not used")
            warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\)")
            yield
    finally:
        logger.setLevel(level)
