r"""Draws which features of toy data fire, as a dense mask or, where few do, as a sparse pattern.

Before any rules, feature :math:`i` fires where a standard normal variable :math:`z_i` is at least
:math:`-\Phi^{-1}(p_i)`, hence with probability :math:`p_i`. Variables of a group share a factor,

.. math:: z_i = \sqrt\rho\, g + \sqrt{1 - \rho}\, e_i,

so their correlation is :math:`\rho` (a one-factor Gaussian copula). Given the factor, features are
independent and fire with probability

.. math:: p_i(g) = \Phi\left(\frac{\Phi^{-1}(p_i) + \sqrt\rho\, g}{\sqrt{1 - \rho}}\right).

Both ways of drawing are exact. The rules of parents and children are applied afterwards.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.special import log_ndtr, ndtr, ndtri
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.data.toy.rules import Rules
from lightning_sae.functional.sparse.patterns import DensePattern, SparsePattern

Pattern = DensePattern | SparsePattern

SPARSE_BELOW = 0.05
"""Mean probability below which many features are drawn as a sparse pattern."""
MANY = 128
"""Smallest number of features for which a sparse pattern is faster."""
CERTAIN = 40.0
"""Rate of a feature of probability 1: it does not fire once in 2e17 draws."""


@runtime_checkable
class Firing(Protocol):
    """Draws which features fire."""

    def draw(self, samples: int, generator: torch.Generator) -> Pattern:
        """Which features fire in independent samples; shape [samples, n_features]."""
        ...


class Factors:
    """The shared factors of correlated features.

    Args:
        probabilities: Probability of each feature.
        correlation: Correlation of two variables of one group, at least 0 and below 1.
        groups: Number of groups, where feature `i` is in group `i % groups`; or the groups as
            lists of features. Features in no list are independent.

    Raises:
        ValueError: If the correlation or a group is out of range.
    """

    def __init__(
        self,
        probabilities: Float[Tensor, " n_features"],
        correlation: float,
        groups: int | Sequence[Sequence[int]],
    ) -> None:
        if not 0 <= correlation < 1:
            raise ValueError(
                "Expected argument `correlation` to be at least 0 and below 1 but got "
                f"{correlation}."
            )
        n = len(probabilities)
        members = _members(groups, n)
        self.n_groups = len(members)
        self.group = torch.zeros(n, dtype=torch.int64)
        self.loading = torch.zeros(n)
        for number, features in enumerate(members):
            self.group[list(features)] = number
            self.loading[list(features)] = correlation**0.5
        self.normal = ndtri(probabilities.double()).float()
        self.active = correlation > 0

    def draw(self, samples: int, generator: torch.Generator) -> Float[Tensor, "groups samples"]:
        """One factor for each group and sample."""
        return torch.randn(self.n_groups, samples, generator=generator)

    def scores(
        self, factors: Float[Tensor, "..."], features: Tensor | slice = slice(None)
    ) -> Float[Tensor, "..."]:
        """The argument of Phi in p(g), with one factor per feature."""
        across = (...,) + (None,) * (factors.ndim - 1)
        normal, loading = self.normal[features][across], self.loading[features][across]
        return (normal + loading * factors) / (1 - loading.square()).sqrt()


def _members(groups: int | Sequence[Sequence[int]], n: int) -> Sequence[Sequence[int]]:
    if isinstance(groups, int):
        if not 1 <= groups <= n:
            raise ValueError(
                "Expected argument `correlation_groups` to be between 1 and the number of "
                f"features, {n}, but got {groups}."
            )
        return [range(first, n, groups) for first in range(groups)]
    named = sorted(feature for group in groups for feature in group)
    if not named or len({*named}) < len(named) or not 0 <= named[0] <= named[-1] < n:
        raise ValueError(
            "Expected argument `correlation_groups` to name features from 0 to "
            f"{n - 1} (`n_features`={n}), each at most once, but got {[*map(list, groups)]}."
        )
    return groups


class DenseFiring:
    """Draws one number per feature and sample: for few features, or features that fire often.

    Args:
        probabilities: Probability of each feature, before any rules.
        rules: Parents and children.
        factors: Correlations.
    """

    def __init__(
        self, probabilities: Float[Tensor, " n_features"], rules: Rules, factors: Factors
    ) -> None:
        self.probabilities = probabilities
        self.rules = rules
        self.factors = factors

    def draw(self, samples: int, generator: torch.Generator) -> Pattern:
        """Which features fire; the mask is stored feature by feature."""
        chance = self.probabilities.unsqueeze(-1)
        if self.factors.active:
            factors = self.factors.draw(samples, generator)
            chance = ndtr(self.factors.scores(factors[self.factors.group]))
        uniform = torch.rand(len(chance), samples, generator=generator)
        return DensePattern(self.rules.settle_matrix(uniform < chance).T)


class SparseFiring:
    r"""Draws only the firings: the cost grows with their number, not with features times samples.

    For feature i, a Poisson process with the rate :math:`\lambda_i = -\log(1 - p_i)` per sample
    gives each sample a number of points. The feature fires where there is at least one point, with
    probability :math:`1 - e^{-\lambda_i} = p_i` and independently of all other samples.

    With correlation, the rate depends on the sample's factor. Samples are sorted by the factor and
    divided into strips. Points are drawn at the rate of the strip's largest factor, and each is
    kept with the ratio of its own sample's rate to that rate as probability (thinning).

    Args:
        probabilities: Probability of each feature, before any rules.
        rules: Parents and children.
        factors: Correlations.
        strips: Number of strips for correlated features.
    """

    def __init__(
        self,
        probabilities: Float[Tensor, " n_features"],
        rules: Rules,
        factors: Factors,
        strips: int = 16,
    ) -> None:
        self.n = len(probabilities)
        self.rate = -torch.log1p(-probabilities.double()).clamp_min(-CERTAIN).float()
        self.rules = rules
        self.factors = factors
        self.strips = strips

    def draw(self, samples: int, generator: torch.Generator) -> Pattern:
        """Which features fire, sample by sample."""
        points = self._correlated if self.factors.active else self._independent
        rows, features = points(samples, generator)
        keys = self.rules.settle_keys((rows * self.n + features).unique())
        return SparsePattern.from_flat(keys, (samples, self.n))

    def _independent(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        counts = torch.poisson(self.rate * samples, generator).long()
        features = torch.arange(self.n).repeat_interleave(counts)
        rows = torch.randint(samples, features.shape, generator=generator)
        return rows, features

    def _correlated(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        factors, order = self.factors.draw(samples, generator).sort(dim=1)
        strips = min(self.strips, samples)
        edges = torch.arange(strips + 1) * samples // strips
        widths = edges.diff()
        largest = self._rates(factors[:, edges[1:] - 1][self.factors.group])
        counts = torch.poisson(largest * widths, generator).long().flatten()
        cells = torch.arange(self.n * strips).repeat_interleave(counts)
        features, strip = cells // strips, cells % strips
        group = self.factors.group[features]
        within = torch.randint(2**62, cells.shape, generator=generator) % widths[strip]
        place = edges[strip] + within
        own = self._rates(factors[group, place], features)
        uniform = torch.rand(cells.shape, generator=generator)
        kept = uniform * largest.flatten()[cells] < own
        return order[group, place][kept], features[kept]

    def _rates(self, factors: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        return -log_ndtr(-self.factors.scores(factors, features)).clamp_min(-CERTAIN)


def choose_firing(
    probabilities: Float[Tensor, " n_features"], rules: Rules, factors: Factors
) -> Firing:
    """The faster of the two ways to draw."""
    few = probabilities.mean().item() < SPARSE_BELOW
    sparse = few and len(probabilities) >= MANY
    return (SparseFiring if sparse else DenseFiring)(probabilities, rules, factors)
