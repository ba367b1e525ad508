"""The architectures of the study of ground truth, and their common recipe and toy data."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_sae.architectures import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    SparseAutoencoder,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.data import ToyDataModule
from lightning_sae.data.toy.features import per_feature
from lightning_sae.functional.penalties import Sqrt

RECIPE = {
    "batch_size": 512,
    "lr": 6e-3,
    "lr_warmup": 0.05,
    "lr_decay": 0.25,
    "penalty_warmup": 0.1,
    "dead_after": 0.02,
    "auxk": 1 / 32,
}
"""Settings of all architectures; lengths are shares of the run.

The learning rate (3e-3 or 6e-3) and the width of JumpReLU's window (1 or 2) were chosen by MCC at
L0 8, on a seed that is in no table. Decoder rows have norm 1 where the penalty depends on how
strong latents are. Where it counts active latents or `k` sets their number, norms are free: larger
norms do not lower the loss, and with norm 1 more latents die or duplicate others.
"""

PROBABILITIES = (0.4, 0.01)  # most and least frequent feature; Zipf's law between
SPREAD = 0.3  # standard deviation of a feature's magnitudes, of mean 1
MAX_COSINE = 0.25  # of two features
BRANCHES = 4  # children of a feature


@dataclass(frozen=True)
class Architecture:
    """An architecture to compare.

    Attributes:
        title: Its name in tables.
        kind: Its class.
        settings: Arguments in addition to the recipe's.
    """

    title: str
    kind: type[SparseAutoencoder]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_steered(self) -> bool:
        """Whether L0 follows from a penalty, adjusted by `TargetL0`; otherwise `k` sets it."""
        return self.kind.coefficient_name is not None


FREE = {"decoder_norm": "free"}  # see RECIPE

ARCHITECTURES = {
    "relu": Architecture("ReLU, L1", ReLUSAE),
    "sqrt": Architecture("ReLU, sqrt", ReLUSAE, {"penalty": Sqrt()}),
    "tied": Architecture("Tied, L1", TiedSAE),
    "gated": Architecture("Gated", GatedSAE),
    "rescale-shift": Architecture("Rescaled and shifted", RescaleAndShiftSAE),
    "jumprelu": Architecture(
        "JumpReLU",
        JumpReLUSAE,
        {"bandwidth": 1.0, "threshold_init": 0.1, "threshold_lr": RECIPE["lr"], **FREE},
    ),
    "topk": Architecture("TopK", TopKSAE, FREE),
    "batchtopk": Architecture("BatchTopK", BatchTopKSAE, FREE),
    "matryoshka": Architecture("Matryoshka", MatryoshkaSAE, FREE),
}

COMPARED = ",".join(name for name in ARCHITECTURES if name != "rescale-shift")
"""Those trained by default."""


@dataclass(frozen=True)
class World:
    """Features in a forest, whose frequencies follow Zipf's law.

    Attributes:
        n_features: Number of features.
        d_in: Width of the activations.
        noise: Standard deviation of the noise on each coordinate.
        rare_magnitude: Mean magnitude of the rarest feature, where the most frequent has 1; a power
            law of the rank between.
    """

    n_features: int
    d_in: int
    noise: float = 0.0
    rare_magnitude: float = 1.0

    def requires(self) -> dict[int, int]:
        """The parent that each child needs to fire; an eighth of the features have none."""
        roots = math.ceil(self.n_features / 8)
        return {child: (child - roots) // BRANCHES for child in range(roots, self.n_features)}

    def data(self, seed: int) -> ToyDataModule:
        """Activations of this world; directions and samples follow from the seed.

        Children fire with a share of their parent's firings such that all features follow Zipf's
        law.
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
            magnitudes={"zipf": (1.0, self.rare_magnitude)},
            magnitude_spread=SPREAD,
            requires=requires,
            noise=self.noise,
            scale=True,
            batch_size=int(RECIPE["batch_size"]),
            seed=seed,
        )
