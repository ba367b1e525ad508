"""Synthetic activations made of known features, as a LightningDataModule."""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import require_between, require_positive
from lightning_sae.data.loaders import Rows, as_asked_for, begins_anew, require_an_end
from lightning_sae.data.scaling import Scaling, estimate_scaling
from lightning_sae.data.source import ActivationSource
from lightning_sae.data.toy.features import (
    PerFeature,
    constant,
    per_feature,
    unit_directions,
)
from lightning_sae.data.toy.firing import Factors, choose_firing
from lightning_sae.data.toy.rules import Rules
from lightning_sae.data.toy.stream import (
    Blocks,
    HeldOutToyBatches,
    ToyBatches,
    seed_of,
)
from lightning_sae.distributed.split import copies_of
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.patterns import DensePattern, SparsePattern


class ToySample(NamedTuple):
    """Activations and the features that they are made of.

    Attributes:
        x: Activations, [n, d_in].
        code: Magnitude of each feature in each sample, [n, n_features], dense or sparse.
    """

    x: Float[Tensor, "n d_in"]
    code: Code

    @property
    def magnitudes(self) -> Float[Tensor, "n n_features"]:
        """The code as a dense matrix; zero where a feature does not fire."""
        return self.code.to_dense()


class ToyDataModule(ActivationSource):
    r"""Sums of known features that fire with known probabilities.

    .. math::
        x = \sum_i a_i\, d_i + b + \sigma \epsilon, \qquad
        a_i = [i \text{ fires}] \cdot \max(0,\ m_i (1 + s\, \eta_i))

    with unit directions :math:`d_i`, mean magnitudes :math:`m_i` and standard normal
    :math:`\epsilon` and :math:`\eta_i`. A feature whose magnitude is clamped to zero does not
    count as firing. Training data is endless; `trainer.max_steps` ends it. Validation and test use
    the same samples each time, which training does not contain. Sources: Chanin et al., "Toy Models
    of Feature Absorption in SAEs" (2024), for parents and children; Chanin and Garriga-Alonso,
    "SynthSAEBench" (2026), for large numbers of features.

    Values for each feature are one number for all, a list, `{linear: [first, last]}`, or
    `{zipf: [first, last]}`, a power law in the feature's rank.

    Args:
        n_features: Number of features.
        d_in: Width of the activations.
        directions: `orthogonal`; `nearly_orthogonal`, moved apart until no two have a |cos| above
            `max_cosine`; `random`, uniform on the sphere; or a tensor [n_features, d_in].
        max_cosine: Largest |cos| of nearly orthogonal directions.
        probabilities: Probability that each feature fires, before the rules of `parents`; for a
            feature in `requires`, given that its parent fires.
        magnitudes: Mean magnitude of each feature when it fires, before clamping at zero.
        magnitude_spread: Standard deviation s of the magnitudes, as a fraction of their mean.
        relative_spread: Whether `magnitude_spread` is such a fraction; if not, it is in the units
            of the activations.
        parents: Maps a feature to its children: it also fires whenever one of them does.
        requires: Maps a feature to its parent: it fires only where the parent does.
        correlation: Correlation of the normal variables that decide about firing in a group.
        correlation_groups: Number of groups, where feature `i` is in group `i % groups`; or the
            groups as lists of features. Features in no list are independent.
        noise: Standard deviation of Gaussian noise on each coordinate.
        bias: The constant b, as a list; or the norm of a b of random direction.
        center: Have the SAE subtract the mean activation, estimated on separate samples.
        scale: Have the SAE scale activations to mean norm sqrt(d_in), estimated likewise.
        batch_size: Activations in a batch.
        n_validation: Held-out activations in a validation, for each rank.
        n_test: Held-out activations in a test, for each rank.
        seed: Seed of the directions and of all samples.

    Attributes:
        features: The directions, [n_features, d_in].
        probabilities: Probability of each feature, [n_features].
        magnitudes: Mean magnitude of each feature, [n_features].
        bias: The constant b, [d_in].
        pairs: All pairs of a parent and a child, of `parents` and `requires`.

    Raises:
        ValueError: If an argument is out of range or there are no such directions.

    Example:
        >>> data = ToyDataModule(3, 8, probabilities=[0.5, 0.2, 0.1], parents={0: [1]})
        >>> sample = data.sample(4, torch.Generator().manual_seed(0))
        >>> sample.x.shape, sample.magnitudes.shape
        (torch.Size([4, 8]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        n_features: int = 20,
        d_in: int = 50,
        *,
        directions: Literal["orthogonal", "nearly_orthogonal", "random"] | Tensor = "orthogonal",
        max_cosine: float = 0.1,
        probabilities: PerFeature = 0.1,
        magnitudes: PerFeature = 1.0,
        magnitude_spread: float = 0.0,
        relative_spread: bool = True,
        parents: dict[int, list[int]] | None = None,
        requires: dict[int, int] | None = None,
        correlation: float = 0.0,
        correlation_groups: int | list[list[int]] = 1,
        noise: float = 0.0,
        bias: float | Sequence[float] = 0.0,
        center: bool = False,
        scale: bool = False,
        batch_size: int = 1024,
        n_validation: int = 32768,
        n_test: int = 131072,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive(n_features=n_features, d_in=d_in, batch_size=batch_size)
        require_positive(n_validation=n_validation, n_test=n_test)
        self.n_features, self.d_in, self.batch_size = n_features, d_in, batch_size
        self.n_validation, self.n_test = n_validation, n_test
        self.center, self.scale = center, scale
        self.seed = seed
        self.probabilities = per_feature("probabilities", probabilities, n_features)
        self.magnitudes = per_feature("magnitudes", magnitudes, n_features)
        self.magnitude_spread, self.relative_spread = magnitude_spread, relative_spread
        self.noise = noise
        require_between(0, 1, probabilities=self.probabilities)
        require_between(0, math.inf, magnitudes=self.magnitudes)
        require_between(0, math.inf, magnitude_spread=magnitude_spread, noise=noise)
        rules = Rules(n_features, parents or {}, requires or {})
        factors = Factors(self.probabilities, correlation, correlation_groups)
        self.pairs = rules.pairs
        self.firing = choose_firing(self.probabilities, rules, factors)
        world = torch.Generator().manual_seed(seed_of(seed, "world"))
        self.features = unit_directions(directions, n_features, d_in, max_cosine, world)
        self.bias = constant(bias, d_in, world)
        self._given = {
            "directions": "given" if isinstance(directions, Tensor) else directions,
            "max_cosine": max_cosine,
            "probabilities": probabilities,
            "magnitudes": magnitudes,
            "parents": parents,
            "requires": requires,
            "correlation": correlation,
            "correlation_groups": correlation_groups,
            "bias": bias,
        }
        self.batches: ToyBatches | None = None
        self._restored: dict[str, Any] = {}
        self._left: dict[str, Any] = {}

    @property
    @override
    def source(self) -> dict[str, Any]:
        """Where the activations come from, as plain values that are saved with an SAE."""
        names = ("n_features", "d_in", "magnitude_spread", "relative_spread", "noise", "seed")
        own = {name: getattr(self, name) for name in names}
        return {"model": "toy", **own, **json.loads(json.dumps(self._given))}

    # Samples.

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> ToySample:
        """Draw independent activations and their features.

        Args:
            n: Number of activations.
            generator: Random number generator on the CPU.
        """
        pattern = self.firing.draw(n, generator)
        code = Code(pattern.only(self._strengths(pattern, generator)), pattern)
        x = code.decode(self.features)
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator)
        if self.bias.any():
            x += self.bias
        return ToySample(x, code)

    def _strengths(
        self, pattern: DensePattern | SparsePattern, generator: torch.Generator
    ) -> Float[Tensor, "..."]:
        """Magnitudes, one for each entry of a sparse pattern or of the whole dense matrix."""
        shape = pattern.rows.shape if isinstance(pattern, SparsePattern) else pattern.shape
        mean = pattern.at(self.magnitudes).expand(shape)
        if not self.magnitude_spread:
            return mean
        deviation = self.magnitude_spread * torch.randn(mean.shape, generator=generator)
        return (mean + deviation * (mean if self.relative_spread else 1.0)).clamp_min(0)

    def _draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d_in"]:
        return self.sample(n, generator).x

    def _blocks(self, stream: str) -> Blocks:
        rank = 0 if self.trainer is None else copies_of(self.trainer).own
        return Blocks(self._draw, self.d_in, self.batch_size, self.seed, stream, rank)

    @override
    def scaling(self) -> Scaling | None:
        """Centring and scaling estimated on 16,384 samples; None if not asked for."""
        return self._estimated if self.center or self.scale else None

    @cached_property
    def _estimated(self) -> Scaling:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "scaling"))
        return estimate_scaling(self._draw(2**14, generator), self.center, self.scale)

    @override
    def unseen(self, n: int) -> Float[Tensor, "n d_in"]:
        """Samples of a separate stream, the same each time."""
        return torch.cat([*HeldOutToyBatches(self._blocks("unseen"), n)])

    # Lightning.

    def setup(self, stage: str) -> None:
        """Check that the run ends.

        Raises:
            ValueError: If it does not, or if something waits for the end of an epoch.
        """
        if stage == "fit":
            require_an_end(self.trainer, self.batch_size)

    def train_dataloader(self) -> Iterable[Rows]:
        """The endless training stream, which continues from a checkpoint on resume.

        With `trainer.overfit_batches`, its first batches as a list.
        """
        present = None if self.batches is None else self.batches.blocks.batch_size
        if begins_anew(self.trainer, self.batch_size, present):
            self.batches, self._restored = None, {}
        if self.batches is None:
            self.batches = ToyBatches(self._blocks("train"))
            state, self._restored = self._restored, {}
            if state:
                self.batches.load_state_dict(state)
        return as_asked_for(self.batches, self.trainer)

    def val_dataloader(self) -> HeldOutToyBatches:
        """The same held-out samples each time."""
        return HeldOutToyBatches(self._blocks("validation"), self.n_validation)

    def test_dataloader(self) -> HeldOutToyBatches:
        """Other held-out samples, the same each time."""
        return HeldOutToyBatches(self._blocks("test"), self.n_test)

    def predict_dataloader(self) -> HeldOutToyBatches:
        """The samples of the test."""
        return self.test_dataloader()

    def teardown(self, stage: str) -> None:
        """Keep the position for a checkpoint that is saved after `fit`; a new `fit` starts over."""
        if stage == "fit" and self.batches is not None:
            self._left = self.state_dict()
            self.batches = None

    def state_dict(self) -> dict[str, Any]:
        """The position in the training stream, for an exact resume."""
        return (self._restored or self._left) if self.batches is None else self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the stream that `train_dataloader` makes."""
        self._restored = state_dict
