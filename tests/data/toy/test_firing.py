from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from lightning_sae.data.toy.firing import DenseFiring, Factors, SparseFiring, choose_firing
from lightning_sae.data.toy.rules import Rules
from lightning_sae.functional.sparse.patterns import SparsePattern

PROBABILITIES = torch.tensor([0.3, 0.2, 0.02, 0.001, 0.0, 1.0, 0.5])
SAMPLES = 30_000

Draw = Callable[..., Tensor]


@pytest.fixture(params=[DenseFiring, SparseFiring])
def draw(request: pytest.FixtureRequest) -> Draw:
    """Firings [samples, n_features] as a boolean matrix, drawn in either layout, in two blocks."""

    def drawn(
        probabilities: Tensor = PROBABILITIES,
        parents: dict[int, list[int]] | None = None,
        requires: dict[int, int] | None = None,
        correlation: float = 0.0,
        groups: int | Sequence[Sequence[int]] = 1,
        seed: int = 0,
    ) -> Tensor:
        rules = Rules(len(probabilities), parents or {}, requires or {})
        firing = request.param(probabilities, rules, Factors(probabilities, correlation, groups))
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([matrix(firing.draw(SAMPLES // 2, generator)) for _ in range(2)])

    return drawn


def matrix(pattern: object) -> Tensor:
    if not isinstance(pattern, SparsePattern):
        return pattern.mask  # type: ignore[attr-defined]
    fires = torch.zeros(pattern.shape, dtype=torch.int64)
    fires.index_put_(
        (pattern.rows.long(), pattern.latents.long()), torch.tensor(1), accumulate=True
    )
    assert fires.max() <= 1, "a firing stands in the list once"
    assert (pattern.rows.diff() >= 0).all()
    return fires.bool()


def assert_rate(events: Tensor, expected: float | Tensor) -> None:
    """The share of true events is within five standard deviations of what is expected."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    deviation = (expected * (1 - expected) / len(events)).sqrt()
    error = (events.double().mean(0) - expected).abs()
    assert (error <= 5 * deviation + 1e-12).all(), (error / deviation).tolist()


def test_features_fire_with_their_probabilities(draw: Draw) -> None:
    assert_rate(draw(), PROBABILITIES)


def test_features_fire_independently(draw: Draw) -> None:
    fires = draw(torch.full((5,), 0.3))
    for i in range(5):
        for j in range(i):
            assert_rate(fires[:, i] & fires[:, j], 0.09)
    assert_rate(fires[1:, 0] & fires[:-1, 0], 0.09)
    number = fires.sum(1).double()
    assert number.var().item() == pytest.approx(5 * 0.3 * 0.7, rel=0.05)


def test_another_seed_gives_other_firings_and_the_same_the_same(draw: Draw) -> None:
    p = torch.tensor([0.2, 0.01])
    assert torch.equal(draw(p), draw(p))
    assert not torch.equal(draw(p), draw(p, seed=1))


def test_a_parent_fires_whenever_a_child_does_and_at_times_by_itself(draw: Draw) -> None:
    p = torch.tensor([0.1, 0.2, 0.05, 0.3])
    fires = draw(p, parents={0: [1, 2]})
    assert fires[fires[:, 1] | fires[:, 2], 0].all()
    alone = fires[~(fires[:, 1] | fires[:, 2]), 0]
    assert_rate(alone, 0.1)
    assert_rate(fires[:, 1:], p[1:])
    assert_rate(fires[:, 0], 1 - 0.9 * 0.8 * 0.95)


def test_a_child_fires_with_its_probability_given_the_parent_and_never_without(draw: Draw) -> None:
    fires = draw(torch.tensor([0.3, 0.4, 0.4, 0.2, 0.5]), requires={1: 0, 2: 0, 4: 2})
    assert not fires[~fires[:, 0], 1:3].any()
    assert not fires[~fires[:, 2], 4].any()
    assert_rate(fires[fires[:, 0]][:, 1:3], 0.4)
    assert_rate(fires[fires[:, 2], 4], 0.5)
    assert_rate(fires[fires[:, 0], 1] & fires[fires[:, 0], 2], 0.16)
    assert_rate(fires[:, [0, 3]], torch.tensor([0.3, 0.2]))


def both_fire(p: float, q: float, correlation: float) -> float:
    """Probability by quadrature over the shared factor."""
    g = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    weights = torch.exp(-g.square() / 2) / (2 * torch.pi) ** 0.5 * (g[1] - g[0])

    def given(p: float) -> Tensor:
        normal = ndtri(torch.tensor(p, dtype=torch.float64))
        return ndtr((normal + correlation**0.5 * g) / (1 - correlation) ** 0.5)

    return (weights * given(p) * given(q)).sum().item()


@pytest.mark.parametrize("correlation", [0.2, 0.7])
def test_features_of_a_group_fire_together_as_the_copula_says(
    draw: Draw, correlation: float
) -> None:
    p = torch.tensor([0.3, 0.1, 0.02, 0.2, 0.0, 1.0])
    fires = draw(p, correlation=correlation, groups=[[0, 1, 2, 4, 5]])
    assert_rate(fires, p)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = both_fire(p[i].item(), p[j].item(), correlation)
        assert expected > 1.3 * p[i] * p[j]
        assert_rate(fires[:, i] & fires[:, j], expected)
    assert_rate(fires[:, 0] & fires[:, 3], 0.06)


def test_correlation_is_within_samples_and_not_between_them(draw: Draw) -> None:
    """Samples come in no order of their factor."""
    fires = draw(torch.full((4,), 0.2), correlation=0.6)
    assert_rate(fires[1:, 0] & fires[:-1, 1], 0.04)
    for part in fires.tensor_split(8):
        assert_rate(part, 0.2)


def test_groups_by_number_are_dealt_in_turn(draw: Draw) -> None:
    fires = draw(torch.full((5,), 0.2), correlation=0.5, groups=2)
    together = both_fire(0.2, 0.2, 0.5)
    for i, j in ((0, 2), (2, 4), (1, 3)):
        assert_rate(fires[:, i] & fires[:, j], together)
    for i, j in ((0, 1), (2, 3), (3, 4)):
        assert_rate(fires[:, i] & fires[:, j], 0.04)


def test_rules_come_after_correlation(draw: Draw) -> None:
    fires = draw(torch.full((4,), 0.2), {0: [1]}, {3: 2}, correlation=0.5)
    assert fires[fires[:, 1], 0].all()
    assert not fires[~fires[:, 2], 3].any()
    assert_rate(fires[:, 3], both_fire(0.2, 0.2, 0.5))


@pytest.mark.parametrize("strips", [1, 3, 100_000])
def test_strips_change_the_work_and_not_the_firings(strips: int) -> None:
    p = torch.tensor([0.2, 0.05])
    firing = SparseFiring(p, Rules(2, {}, {}), Factors(p, 0.5, 1), strips)
    fires = matrix(firing.draw(5000, torch.Generator().manual_seed(0)))
    assert_rate(fires, p)
    assert_rate(fires.all(1), both_fire(0.2, 0.05, 0.5))
    few = matrix(firing.draw(3, torch.Generator().manual_seed(0)))
    assert few.shape == (3, 2)


def test_many_rare_features_are_drawn_as_a_list_and_others_as_a_matrix() -> None:
    def chosen(n: int, p: float) -> type:
        probabilities = torch.full((n,), p)
        factors = Factors(probabilities, 0.0, 1)
        return type(choose_firing(probabilities, Rules(n, {}, {}), factors))

    assert chosen(1000, 0.01) is SparseFiring
    assert chosen(1000, 0.2) is DenseFiring
    assert chosen(4, 0.01) is DenseFiring


@pytest.mark.parametrize(
    ("correlation", "groups", "message"),
    [
        (1.0, 1, "`correlation` to be at least 0 and below 1 but got 1.0"),
        (-0.1, 1, "`correlation` to be at least 0 and below 1 but got -0.1"),
        (0.5, 0, "`correlation_groups` to be between 1 and the number of features, 7, but got 0"),
        (
            0.5,
            [[0, 7]],
            r"`correlation_groups` to name features from 0 to 6 .*but got \[\[0, 7\]\]",
        ),
        (0.5, [[0, 1], [1]], "each at most once, but got"),
        (0.5, [], "`correlation_groups` to name features"),
    ],
)
def test_correlations_that_cannot_be_are_refused(
    correlation: float, groups: int | list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Factors(PROBABILITIES, correlation, groups)
