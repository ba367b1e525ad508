import random
from typing import Any

import pytest
import torch

from lightning_sae.data.toy.rules import Rules

Graph = tuple[dict[int, list[int]], dict[int, int]]


def random_graph(seed: int, n: int) -> Graph:
    """Rules without a cycle: each feature depends on features with larger numbers."""
    rng = random.Random(seed)
    parents: dict[int, list[int]] = {}
    requires: dict[int, int] = {}
    for feature in range(n - 1):
        later = range(feature + 1, n)
        kind = rng.random()
        if kind < 0.3:
            requires[feature] = rng.choice(later)
        elif kind < 0.6:
            parents[feature] = rng.sample(later, min(len(later), rng.randint(1, 3)))
    return parents, requires


def naive(draws: list[bool], graph: Graph) -> list[bool]:
    parents, requires = graph

    def fires(feature: int) -> bool:
        allowed = feature not in requires or fires(requires[feature])
        return (draws[feature] and allowed) or any(map(fires, parents.get(feature, ())))

    return [fires(feature) for feature in range(len(draws))]


@pytest.mark.parametrize("seed", range(6))
def test_both_layouts_settle_as_the_definition_says(seed: int) -> None:
    n, samples = 12, 200
    graph = random_graph(seed, n)
    rules = Rules(n, *graph)
    draws = torch.rand(samples, n) < 0.3
    expected = torch.tensor([naive(row, graph) for row in draws.tolist()])
    assert not torch.equal(draws, expected)
    assert torch.equal(rules.settle_matrix(draws.T.clone()).T, expected)
    keys = rules.settle_keys(draws.flatten().nonzero().flatten())
    assert torch.equal(keys, expected.flatten().nonzero().flatten())


def test_no_firings_stay_none() -> None:
    rules = Rules(4, {0: [1, 2]}, {3: 0})
    assert rules.settle_keys(torch.empty(0, dtype=torch.int64)).numel() == 0


def test_pairs_are_those_of_both_rules() -> None:
    assert Rules(6, {0: [1, 2]}, {4: 3}).pairs == [(0, 1), (0, 2), (3, 4)]
    assert Rules(6, {}, {}).pairs == []


@pytest.mark.parametrize(
    ("parents", "requires", "message"),
    [
        (
            {0: [1], 1: [2], 2: [0]},
            {},
            "no cycle but got .*0.*: a feature cannot depend on itself",
        ),
        ({0: [1]}, {1: 0}, "no cycle but got .*1"),
        ({}, {3: 3}, "no cycle but got 3 - 3"),
        ({0: [4]}, {}, r"`parents` to name features from 0 to 3 .*but got \[4\]"),
        ({}, {1: -1}, r"`requires` to name features from 0 to 3 .*but got \[-1\]"),
        (
            {1: [2]},
            {1: 0},
            r"different features but \[1\] are in both: a feature that its child",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(parents: Any, requires: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(4, parents, requires)
