"""Training of one SAE of an experiment."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Callback

from lightning_sae.architectures import ReLUSAE, TiedSAE
from lightning_sae.callbacks import AuxThresholdWarmup, DecoderNormProjection
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.broken_latents.settings import (
    BATCH_SIZE,
    OPTIMISATION,
    Experiment,
    Variant,
)
from lightning_sae.studies.shared.pool import Report
from lightning_sae.studies.shared.toy_training import Progress, train_on_toy


@dataclass(frozen=True)
class ExperimentRun:
    """One SAE to train.

    Attributes:
        experiment: Its toy data.
        variant: Its kind of SAE.
        seed: Seed of the toy data, its samples and the SAE's initial weights.
        samples: Activations to train on.
        decoder_norm: `unit` or `free` norms of decoder rows.
        decoder_init_norm: Their initial norm.
    """

    experiment: Experiment
    variant: Variant
    seed: int
    samples: int
    decoder_norm: Literal["unit", "free"] = "unit"
    decoder_init_norm: float = 1.0

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = "".join(c if c.isalnum() else " " for c in self.variant.name).split()
        return f"{self.experiment.number}-{'-'.join(words)}-seed-{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.samples // BATCH_SIZE)

    def world(self) -> ToyDataModule:
        """The experiment's world with the variant's changes."""
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
                decoder_norm=self.decoder_norm,
                decoder_init_norm=self.decoder_init_norm,
                **(OPTIMISATION | self.variant.sae),
            )

    def callbacks(self) -> list[Callback]:
        """The callbacks of unit rows and of the auxiliary loss.

        The loss is off for a third of the run and rises for a third.
        """
        found: list[Callback] = [DecoderNormProjection()] if self.decoder_norm == "unit" else []
        if self.variant.has_loss:
            found.append(AuxThresholdWarmup(self.steps // 3, max(1, self.steps // 3)))
        return found


def train(run: ExperimentRun, report: Report) -> tuple[ReLUSAE, ToyDataModule, float]:
    """The trained SAE of a run, its world, and the seconds that training took."""
    world = run.world()
    sae = run.sae(world.d_in)
    began = time.perf_counter()
    train_on_toy(sae, world, run.steps, [*run.callbacks(), Progress(report)])
    return sae, world, time.perf_counter() - began
