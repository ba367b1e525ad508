"""The experiments of the study of broken latents: toy data, SAEs, and the document's results.

Source: Chanin et al., Broken latents: studying SAEs and feature co-occurrence in toy models (2024).
It does not give batch sizes, learning rates, the probabilities of experiment 1 and the L1
coefficients of experiments other than 6; these are chosen here, and so are shorter runs. Of the
document's 150 million samples the auxiliary loss is off for a third and rises for a third; here
too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_sae.studies.broken_latents.checks import (
    Check,
    absorbed,
    clean,
    dead,
    exactly,
    learnt,
    mixed,
    one_mixture,
    several_peaks,
    spare_latents_misused,
    takes_in,
)

BATCH_SIZE = 1024
OPTIMISATION: dict[str, Any] = {
    "lr": 1e-3,
    "lr_warmup_steps": 0,
    "lr_decay_steps": 0,
    "b_dec_init": "zero",
}

UNTIED, TIED, WITH_LOSS = "untied", "tied", "tied + auxiliary loss"


@dataclass(frozen=True)
class Variant:
    """One kind of SAE in an experiment.

    Attributes:
        name: Its name in tables.
        reported: The document's result.
        checks: Checks of the document's result.
        tied: Whether encoder and decoder are one matrix.
        sae: Further arguments of the SAE.
        world: Arguments of `ToyDataModule` that differ from the experiment's.
    """

    name: str
    reported: str
    checks: Sequence[Check]
    tied: bool = True
    sae: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)

    @property
    def has_loss(self) -> bool:
        """Whether it has the auxiliary loss."""
        return "orthogonality_coefficient" in self.sae


@dataclass(frozen=True)
class Experiment:
    """A world and the SAEs that are trained on it.

    Attributes:
        number: Its number in the command's `experiments`.
        title: Its topic.
        world: Arguments of `ToyDataModule`.
        d_sae: Number of latents.
        l1_coefficient: Weight of the penalty.
        samples: Activations that each SAE is trained on.
        variants: The SAEs.
        seeds: SAEs of each variant, unless the user says otherwise.
    """

    number: int
    title: str
    world: dict[str, Any]
    d_sae: int
    l1_coefficient: float
    samples: int
    variants: Sequence[Variant]
    seeds: int = 3


AUXILIARY: dict[str, Any] = {
    "orthogonality_coefficient": 1e4,
    "orthogonality_threshold_share": 0.7,
    "orthogonality_window": 50,
}
MIXTURE = AUXILIARY | {"orthogonality_threshold": "mixture"}
MANY: dict[str, Any] = {
    "n_features": 20,
    "d_in": 50,
    "probabilities": {"linear": (0.3 / 20, 0.3)},
    "magnitudes": {"linear": (20.0, 1.0)},
}
"""Twenty features: the rarer, the stronger."""
ONE_PARENT: dict[str, Any] = {
    "n_features": 4,
    "d_in": 50,
    "probabilities": (0.3, 0.4, 0.4, 0.2),
    "requires": {1: 0, 2: 0},
}

EXPERIMENTS = (
    Experiment(
        number=1,
        title="A child that fires only with its parent; as many latents as features",
        world={
            "n_features": 4,
            "d_in": 50,
            "probabilities": (0.25, 0.2, 0.05, 0.05),
            "requires": {1: 0},
        },
        d_sae=4,
        l1_coefficient=0.02,
        samples=6_000_000,
        variants=(
            Variant(
                UNTIED,
                "Absorption: the latent of feature 0 is silent when feature 1 fires, and the "
                "decoder of the latent of feature 1 is the sum of both.",
                (absorbed(),),
                tied=False,
            ),
            Variant(TIED, "Each latent is one feature.", (exactly(range(4)),)),
        ),
    ),
    Experiment(
        number=2,
        title="More latents than features",
        world={"n_features": 4, "d_in": 20, "probabilities": 0.2},
        d_sae=8,
        l1_coefficient=0.1,
        samples=6_000_000,
        variants=(
            Variant(
                UNTIED,
                "Two latents are dead; one is a duplicate, one stands for features 0 and 1 "
                "together.",
                (spare_latents_misused(),),
                tied=False,
            ),
            Variant(
                TIED,
                "One latent for each feature; the others are dead.",
                (exactly(range(4)), dead(4)),
            ),
            Variant(
                "tied, 0 the parent of 1 and 2",
                "The same.",
                (exactly(range(4)), dead(4)),
                world={"requires": {1: 0, 2: 0}},
            ),
        ),
    ),
    Experiment(
        number=3,
        title="Fewer latents than features, all independent",
        world=MANY,
        d_sae=5,
        l1_coefficient=0.1,
        samples=10_000_000,
        variants=(
            Variant(
                TIED,
                "The features of largest probability x magnitude^2: 4 to 8.",
                (exactly(range(4, 9)),),
            ),
            Variant(UNTIED, "The same.", (exactly(range(4, 9)),), tied=False),
        ),
    ),
    Experiment(
        number=4,
        title="A parent that is not learnt: feature 12 fires whenever 5 or 7 does",
        world=MANY | {"parents": {12: [5, 7]}},
        d_sae=5,
        l1_coefficient=1e-3,
        samples=8_000_000,
        variants=(
            Variant(
                TIED,
                "The latents of features 5 and 7 have feature 12 in them, and a negative part of "
                "each other; their activations have several peaks, those of the others one.",
                (mixed(), takes_in(12, (5, 7)), several_peaks()),
            ),
            Variant(
                WITH_LOSS,
                "All five features are recovered.",
                (clean(), exactly(range(4, 9))),
                sae=AUXILIARY,
            ),
        ),
    ),
    Experiment(
        number=5,
        title="A parent that would be learnt: feature 6 fires whenever 5 or 7 does",
        world=MANY | {"parents": {6: [5, 7]}},
        d_sae=5,
        l1_coefficient=1e-3,
        samples=8_000_000,
        variants=(
            Variant(
                TIED,
                "Two latents for mixtures of features 5, 6 and 7; a latent for feature 3.",
                (mixed(), learnt(3)),
            ),
            Variant(
                WITH_LOSS,
                "Features 3, 4, 5, 7 and 8, clean; feature 6 is missing.",
                (clean(), exactly((3, 4, 5, 7, 8))),
                sae=AUXILIARY,
            ),
        ),
    ),
    Experiment(
        number=6,
        title="As 5, in superposition: 20 features in 19 dimensions",
        world=MANY
        | {
            "d_in": 19,
            "directions": "nearly_orthogonal",
            "max_cosine": 0.06,
            "parents": {6: [5, 7]},
        },
        d_sae=5,
        l1_coefficient=1e-2,
        samples=8_000_000,
        variants=(
            Variant(
                TIED,
                "Features 3, 4 and 8 are tracked; 5, 6 and 7 are mixed.",
                (mixed(), *(learnt(feature, 0.9) for feature in (3, 4, 8))),
            ),
            Variant(
                WITH_LOSS,
                "Features 3, 4, 5, 7 and 8, clean; feature 6 is missing.",
                (clean(0.97), exactly((3, 4, 5, 7, 8), 0.97)),
                sae=AUXILIARY,
            ),
        ),
    ),
    Experiment(
        number=7,
        title="A single latent; features 1 and 2 fire only with their parent, 0",
        world=ONE_PARENT,
        d_sae=1,
        l1_coefficient=0.01,
        samples=2_000_000,
        variants=(
            Variant(
                UNTIED,
                "The latent is feature 0 with parts of 1 and 2, and nothing of 3.",
                (one_mixture((0, 1, 2), (3,)),),
                tied=False,
            ),
            Variant(TIED, "Nearly the same.", (one_mixture((0, 1, 2), (3,)),)),
        ),
    ),
    Experiment(
        number=8,
        title="As 4, with magnitudes so spread that the peaks of a latent overlap",
        world=MANY | {"parents": {12: [5, 7]}},
        d_sae=5,
        l1_coefficient=1e-3,
        samples=6_000_000,
        variants=tuple(
            Variant(
                f"{name}, spread {spread:g}",
                "nothing: it asks for a threshold for peaks that overlap.",
                checks,
                sae=sae,
                world={"magnitude_spread": spread},
            )
            for spread in (0.6, 1.2)
            for name, sae, checks in (
                (TIED, {}, (mixed(),)),
                ("threshold .7", AUXILIARY, (clean(0.97),)),
                ("threshold by mixture, else .7", MIXTURE, (clean(0.97),)),
                (
                    "threshold by mixture, else .05",
                    MIXTURE | {"orthogonality_threshold_share": 0.05},
                    (clean(0.97),),
                ),
            )
        ),
        seeds=5,
    ),
    Experiment(
        number=9,
        title="As 7, with the inverse loss: can a single latent learn the parent alone?",
        world=ONE_PARENT,
        d_sae=1,
        l1_coefficient=0.01,
        samples=2_000_000,
        variants=tuple(
            Variant(
                f"{name}, weight {weight:g}",
                "nothing: it expects that high peaks have to be projected out.",
                (exactly([0]),),
                sae=sae | {"orthogonality_coefficient": weight, "orthogonality_side": "high"},
            )
            for name, sae in (
                ("threshold .7", AUXILIARY),
                (
                    "threshold by mixture, else none",
                    MIXTURE | {"orthogonality_threshold_share": 1.0},
                ),
            )
            for weight in (1.0, 3.0, 10.0)
        ),
        seeds=5,
    ),
)
