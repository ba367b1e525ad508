"""Training of one SAE of the study of ground truth."""

import math
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback

from lightning_sae.architectures import MatryoshkaSAE, SparseAutoencoder
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup, TargetL0
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.ground_truth.settings import ARCHITECTURES, RECIPE, World
from lightning_sae.studies.shared.pool import Report
from lightning_sae.studies.shared.toy_training import Progress, train_on_toy


@dataclass(frozen=True)
class ArchitectureRun:
    """One SAE to train.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        l0: Target number of active latents.
        seed: Seed of the toy data, its samples and the SAE's initial weights.
        world: The toy data.
        d_sae: Number of latents.
        samples: Activations to train on.
        decoder_norm: `unit` or `free`; None for that of the architecture.
        decoder_init_norm: Initial norm of rows that are `free`.
    """

    architecture: str
    l0: int
    seed: int
    world: World
    d_sae: int
    samples: int
    decoder_norm: str | None = None
    decoder_init_norm: float = 1.0

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.architecture}-l0-{self.l0}-seed-{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.samples / RECIPE["batch_size"])

    @property
    def prefixes(self) -> list[int]:
        """Widths of nested SAEs."""
        return sorted({max(1, self.d_sae // part) for part in (16, 8, 4, 2, 1)})

    def share(self, name: str) -> int:
        """A share of the run in steps."""
        return int(RECIPE[name] * self.steps)

    @property
    def norm_of_rows(self) -> str:
        """`unit` if decoder rows have norm 1, else `free`."""
        own = ARCHITECTURES[self.architecture].settings.get("decoder_norm", "unit")
        return self.decoder_norm or own

    def sae(self) -> SparseAutoencoder:
        """The SAE before training."""
        architecture = ARCHITECTURES[self.architecture]
        own = architecture.settings | {"decoder_norm": self.norm_of_rows}
        if self.norm_of_rows == "free":
            own["decoder_init_norm"] = self.decoder_init_norm
        if not architecture.is_steered:
            own["k"] = self.l0
        if architecture.kind is MatryoshkaSAE:
            own["prefixes"] = self.prefixes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return architecture.kind(
                self.world.d_in,
                self.d_sae,
                lr=RECIPE["lr"],
                lr_warmup_steps=self.share("lr_warmup"),
                lr_decay_steps=self.share("lr_decay"),
                dead_after=max(1, int(RECIPE["dead_after"] * self.samples)),
                revive="auxk",
                revive_coefficient=RECIPE["auxk"],
                **own,
            )

    def callbacks(self) -> list[Callback]:
        """Unit decoder rows, if requested; for a penalty also its warm-up and `TargetL0`."""
        architecture = ARCHITECTURES[self.architecture]
        found: list[Callback] = [DecoderNormProjection()] if self.norm_of_rows == "unit" else []
        if architecture.is_steered:
            found += [L1Warmup(max(1, self.share("penalty_warmup"))), TargetL0(self.l0)]
        return found


def train(run: ArchitectureRun, data: ToyDataModule, report: Report) -> SparseAutoencoder:
    """The trained SAE of a run."""
    sae = run.sae()
    train_on_toy(sae, data, run.steps, [*run.callbacks(), Progress(report)])
    return sae
