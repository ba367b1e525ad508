"""The league of architectures: one world for all, one recipe, and what each makes of it."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_sae.architectures import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SparseAutoencoder,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup, TargetL0
from lightning_sae.data import ToyDataModule
from lightning_sae.data.toy.features import per_feature
from lightning_sae.data.toy.stream import seed_of
from lightning_sae.functional.matching import cosine_matrix, mean_correlation_coefficient
from lightning_sae.functional.penalties import Sqrt
from lightning_sae.metrics import held_out_metrics
from lightning_sae.metrics.ground_truth import ground_truth_metrics
from lightning_sae.studies.shared.toy_training import Progress, Report, quiet

RECIPE = {
    "batch_size": 512,
    "lr": 6e-3,
    "lr_warmup": 0.05,
    "lr_decay": 0.25,
    "penalty_warmup": 0.1,
    "dead_after": 0.02,
    "auxk": 1 / 32,
}
"""What all share; lengths are shares of the run.

The learning rate was chosen of 3e-3 and 6e-3, and the width of JumpReLU's window of 1 and 2, on a
seed that is in no table, at L0 8, by MCC. Decoder rows have norm 1 where a penalty sees how strong
latents are. Where it counts them, or their number is given, norms are free: nothing is gained by
growing them, and with norm 1 more latents die or find what others have found.
"""

HELD_OUT = 65_536
CHUNK = 4096
FOUND = 0.9  # |cosine| from which a feature counts as found

PROBABILITIES = (0.4, 0.01)  # of the most frequent feature and the least, by Zipf's law between
SPREAD = 0.3  # standard deviation of a feature's magnitudes, of mean 1
MAX_COSINE = 0.25  # of two features
BRANCHES = 4  # children of a feature


@dataclass(frozen=True)
class Architecture:
    """An entrant.

    Attributes:
        title: What it is called in tables.
        kind: Its class.
        settings: Arguments besides the recipe's; a penalty's coefficient is where steering starts.
    """

    title: str
    kind: type[SparseAutoencoder]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_steered(self) -> bool:
        """Whether L0 comes about by a penalty; else it is the argument `k`."""
        return self.kind.coefficient_name is not None


FREE = {"decoder_norm": "free"}  # see RECIPE

ARCHITECTURES = {
    "relu": Architecture("ReLU, L1", ReLUSAE),
    "sqrt": Architecture("ReLU, sqrt", ReLUSAE, {"penalty": Sqrt()}),
    "tied": Architecture("Tied, L1", TiedSAE),
    "gated": Architecture("Gated", GatedSAE),
    "jumprelu": Architecture(
        "JumpReLU",
        JumpReLUSAE,
        {"bandwidth": 1.0, "threshold_init": 0.1, "threshold_lr": RECIPE["lr"], **FREE},
    ),
    "topk": Architecture("TopK", TopKSAE, FREE),
    "batchtopk": Architecture("BatchTopK", BatchTopKSAE, FREE),
    "matryoshka": Architecture("Matryoshka", MatryoshkaSAE, FREE),
}


@dataclass(frozen=True)
class World:
    """Features in a forest, whose frequencies follow Zipf's law.

    Attributes:
        n_features: Number of features.
        d_in: Width of the activations.
        noise: Standard deviation of the noise on each coordinate.
    """

    n_features: int
    d_in: int
    noise: float = 0.0

    def requires(self) -> dict[int, int]:
        """Child to the parent without which it does not fire; an eighth of features are roots."""
        roots = math.ceil(self.n_features / 8)
        return {child: (child - roots) // BRANCHES for child in range(roots, self.n_features)}

    def data(self, seed: int) -> ToyDataModule:
        """Activations of this world; directions and samples follow from the seed.

        A child fires with such a share of its parent that all features follow Zipf's law.
        """
        shares = per_feature("probabilities", {"zipf": PROBABILITIES}, self.n_features).tolist()
        requires = self.requires()
        own = [p / shares[requires[i]] if i in requires else p for i, p in enumerate(shares)]
        return ToyDataModule(
            self.n_features,
            self.d_in,
            directions="orthogonal" if self.n_features <= self.d_in else "nearly_orthogonal",
            max_cosine=MAX_COSINE,
            probabilities=own,
            magnitude_spread=SPREAD,
            requires=requires,
            noise=self.noise,
            scale=True,
            batch_size=int(RECIPE["batch_size"]),
            seed=seed,
        )


@dataclass(frozen=True)
class Run:
    """One SAE to train.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        l0: Active latents that are wished for.
        seed: Of the world, its samples and the SAE's first weights.
        world: What it is trained on.
        d_sae: Number of latents.
        samples: Activations to train on.
        folder: Where its figures are kept.
        decoder_norm: `unit` or `free`; None for what the architecture has.
    """

    architecture: str
    l0: int
    seed: int
    world: World
    d_sae: int
    samples: int
    folder: Path
    decoder_norm: str | None = None

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / f"{self.architecture}-l0-{self.l0}-seed-{self.seed}.json"

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        return math.ceil(self.samples / RECIPE["batch_size"])

    @property
    def prefixes(self) -> list[int]:
        """Widths of nested SAEs."""
        return sorted({max(1, self.d_sae // part) for part in (16, 8, 4, 2, 1)})

    def share(self, name: str) -> int:
        """Steps that a share of the recipe comes to."""
        return int(RECIPE[name] * self.steps)

    @property
    def norm_of_rows(self) -> str:
        """Whether decoder rows have norm 1, `unit`, or any, `free`."""
        own = ARCHITECTURES[self.architecture].settings.get("decoder_norm", "unit")
        return self.decoder_norm or own

    def sae(self) -> SparseAutoencoder:
        """The SAE before training."""
        entrant = ARCHITECTURES[self.architecture]
        own = entrant.settings | {"decoder_norm": self.norm_of_rows}
        if not entrant.is_steered:
            own["k"] = self.l0
        if entrant.kind is MatryoshkaSAE:
            own["prefixes"] = self.prefixes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return entrant.kind(
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
        """What keeps decoder rows; for a penalty a warm-up, and then steering to the wished L0."""
        entrant = ARCHITECTURES[self.architecture]
        found: list[Callback] = [DecoderNormProjection()] if self.norm_of_rows == "unit" else []
        if entrant.is_steered:
            found += [L1Warmup(max(1, self.share("penalty_warmup"))), TargetL0(self.l0)]
        return found


def train(run: Run, data: ToyDataModule, report: Report) -> SparseAutoencoder:
    """The trained SAE of a run."""
    sae = run.sae()
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            barebones=True,
            max_steps=run.steps,
            limit_val_batches=0,
            callbacks=[*run.callbacks(), Progress(report)],
        )
        trainer.fit(sae, datamodule=data)
    return sae.eval()


def one_run(run: Run, report: Callable[[int], None]) -> dict[str, Any]:
    """Train and measure the SAE of a run; its figures, from its file if there is one."""
    if run.path.is_file():
        report(run.samples)
        return dict(json.loads(run.path.read_text()))
    data = run.world.data(run.seed)
    began = time.process_time()
    sae = train(run, data, report)
    seconds = time.process_time() - began
    figures = {
        "architecture": run.architecture,
        "target_l0": run.l0,
        "seed": run.seed,
        **measure(sae, held_out(data), data.features, data.pairs),
        "coefficient": _coefficient(sae),
        "seconds": seconds,
    }
    part = run.path.with_suffix(".part")
    part.write_text(json.dumps(figures) + "\n")
    part.replace(run.path)  # so that a file that is there is whole
    return figures


def _coefficient(sae: SparseAutoencoder) -> float | None:
    """That of the penalty, as steering left it."""
    return None if sae.coefficient_name is None else sae.weight_of_penalty()


def held_out(data: ToyDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out activations [chunk, d_in] and their magnitudes [chunk, n_features]."""
    generator = torch.Generator().manual_seed(seed_of(data.seed, "study"))
    for _ in range(HELD_OUT // CHUNK):
        sample = data.sample(CHUNK, generator)
        yield sample.x, sample.magnitudes


@torch.no_grad()
def measure(
    sae: Any,
    samples: Iterable[tuple[Tensor, Tensor]],
    features: Float[Tensor, "n_features d_in"],
    pairs: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Figures of an SAE on activations whose magnitudes are known.

    Args:
        sae: Anything with `W_dec`, `encode` and `decode`, on raw activations.
        samples: Pairs of activations and magnitudes.
        features: Directions.
        pairs: Pairs of a parent and a child, at least one.
    """
    rebuilt = held_out_metrics(features.shape[1], len(sae.W_dec))
    known = ground_truth_metrics(sae.W_dec, features, pairs)
    fires, n = 0, 0
    for x, magnitudes in samples:
        f = sae.encode(x)
        rebuilt.update(x=x, x_hat=sae.decode(f), f=f)
        known.update(f=f, magnitudes=magnitudes)
        fires, n = fires + int(magnitudes.count_nonzero()), n + len(x)
    best = cosine_matrix(sae.W_dec, features).abs().amax(0)
    figures: dict[str, Any] = {
        "true_l0": fires / n,
        "mcc": mean_correlation_coefficient(sae.W_dec, features),
        "found": (best >= FOUND).double().mean(),
        **_of_all(rebuilt.compute()),
        **_of_latents(known.compute()),
    }
    return {name: float(value) for name, value in figures.items()}


def _of_all(rebuilt: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "l0": rebuilt["l0"],
        "fvu": rebuilt["fvu"],
        "relative_reconstruction_bias": rebuilt["relative_reconstruction_bias"],
        "dead": rebuilt["dead_fraction"],
    }


def _of_latents(known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over latents; where a latent has no such figure it is left out, or counts 0 in F1."""
    return {
        "f1": known["f1"].nan_to_num().mean(),
        "precision": known["precision"].nanmean(),
        "recall": known["recall"].nanmean(),
        "shrinkage": known["shrinkage"].nanmedian(),
        "duplicates": known["duplicate_fraction"],
        "absorption": known["absorption"].nanmean(),
        "absorption_baseline": known["absorption_baseline"].nanmean(),
    }
