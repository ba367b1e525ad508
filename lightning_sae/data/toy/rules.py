"""Dependences between features of toy data: parents and children."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class Generation:
    """Rules that can be applied at the same time.

    Attributes:
        needs: Maps a child to the parent without which it does not fire.
        raises: Maps a child to a parent that it makes fire. A list, as a child may have several.
    """

    needs: dict[int, int] = field(default_factory=dict)
    raises: list[dict[int, int]] = field(default_factory=list)

    def add_raise(self, child: int, parent: int) -> None:
        """Add a pair to the first map without this child."""
        for pairs in self.raises:
            if child not in pairs:
                pairs[child] = parent
                return
        self.raises.append({child: parent})


class Rules:
    """The two kinds of dependence, applied to independent draws in topological order.

    Args:
        n: Number of features.
        parents: Maps a parent to its children: it also fires whenever one of them does.
        requires: Maps a child to its parent: the child fires only where the parent does.

    Attributes:
        pairs: All pairs of a parent and a child.

    Raises:
        ValueError: If an index is out of range, a feature has rules of both kinds, or the rules
            form a cycle.
    """

    def __init__(
        self, n: int, parents: Mapping[int, Sequence[int]], requires: Mapping[int, int]
    ) -> None:
        _check(n, parents, requires)
        self.n = n
        raising = [(parent, child) for parent, children in parents.items() for child in children]
        self.pairs = raising + [(parent, child) for child, parent in requires.items()]
        self.generations = list(_generations(parents, requires))
        self._lookups = [
            (_lookup(g.needs, n), [_lookup(r, n) for r in g.raises]) for g in self.generations
        ]

    def settle_matrix(self, fires: Bool[Tensor, "n samples"]) -> Bool[Tensor, "n samples"]:
        """Apply the rules, in place."""
        for generation in self.generations:
            for child, parent in generation.needs.items():
                fires[child] &= fires[parent]
            for pairs in generation.raises:
                for child, parent in pairs.items():
                    fires[parent] |= fires[child]
        return fires

    def settle_keys(self, keys: Int[Tensor, " firings"]) -> Int[Tensor, " settled"]:
        """Apply the rules to sorted firings, given as `sample * n + feature`."""
        for generation, (needs, raises) in zip(self.generations, self._lookups, strict=True):
            if generation.needs:
                parents, features = _partners(needs, keys, self.n)
                keys = keys[(parents < 0) | _contains(keys, keys - features + parents)]
            for lookup in raises:
                parents, features = _partners(lookup, keys, self.n)
                raised = (keys - features + parents)[parents >= 0]
                keys = torch.cat([keys, raised]).unique()
        return keys


def _generations(
    parents: Mapping[int, Sequence[int]], requires: Mapping[int, int]
) -> Iterator[Generation]:
    before: dict[int, Sequence[int]] = {child: [parent] for child, parent in requires.items()}
    sorter = TopologicalSorter({**before, **parents})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ValueError(
            "Expected arguments `parents` and `requires` to have no cycle but got "
            f"{' - '.join(map(str, error.args[1]))}: a feature cannot depend on itself."
        ) from error
    while sorter.is_active():
        ready, generation = sorter.get_ready(), Generation()
        sorter.done(*ready)
        for feature in sorted(ready):
            if feature in requires:
                generation.needs[feature] = requires[feature]
            for child in parents.get(feature, ()):
                generation.add_raise(child, feature)
        if generation.needs or generation.raises:
            yield generation


def _check(n: int, parents: Mapping[int, Sequence[int]], requires: Mapping[int, int]) -> None:
    named = {*parents, *(c for children in parents.values() for c in children)}
    for argument, features in (("parents", named), ("requires", {*requires, *requires.values()})):
        outside = sorted(feature for feature in features if not 0 <= feature < n)
        if outside:
            raise ValueError(
                f"Expected argument `{argument}` to name features from 0 to {n - 1} "
                f"(`n_features`={n}) but got {outside}."
            )
    both = sorted(parents.keys() & requires.keys())
    if both:
        raise ValueError(
            f"Expected arguments `parents` and `requires` to name different features but {both} "
            "are in both: a feature that its children make fire may fire without its own parent. "
            "Remove them from one."
        )


def _lookup(pairs: Mapping[int, int], n: int) -> Int[Tensor, " n"]:
    """The partner of each feature, or -1."""
    table = torch.full((n,), -1)
    table[list(pairs)] = torch.tensor(list(pairs.values()), dtype=torch.int64)
    return table


def _partners(lookup: Tensor, keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    features = keys % n
    return lookup[features], features


def _contains(rising: Int[Tensor, " n"], wanted: Int[Tensor, " m"]) -> Bool[Tensor, " m"]:
    """Which of the wanted numbers are among sorted ones."""
    places = torch.searchsorted(rising, wanted).clamp_max(max(len(rising) - 1, 0))
    return rising[places] == wanted
