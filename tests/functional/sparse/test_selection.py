from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.sparse import selection
from lightning_sae.functional.sparse.selection import (
    Above,
    BatchTopK,
    Rule,
    TopK,
    chosen_among,
    row_top_k,
    true_places,
)

T = TypeVar("T")


def chunks(pre: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Chunks that all lie in the same memory, as `encode` gives them: each spoils the last."""
    memory = torch.empty(rows, pre.shape[1], dtype=pre.dtype)
    for first in range(0, max(1, len(pre)), rows):
        chunk = pre[first : first + rows]
        yield first, memory[: len(chunk)].copy_(chunk)
    memory.fill_(torch.nan)


def selected(rule: Rule, pre: Tensor, rows: int) -> tuple[list[list[int]], Tensor]:
    """Entries that a rule selects, and their values; the promises that all rules make are checked.

    These are: row by row, no entry twice, and the value of each entry is the one it has.
    """
    indices, values = rule.select(chunks(pre, rows))
    latents = pre.shape[1]
    by_row = indices.div(max(1, latents), rounding_mode="floor")
    assert (by_row.diff() >= 0).all()
    assert len(indices.unique()) == len(indices)
    assert torch.equal(values, pre.flatten()[indices])
    entries = [[i // latents, i % latents] for i in sorted(indices.tolist())]
    return entries, values


def pre_activations(rows: int, latents: int, distinct: bool = True) -> Tensor:
    if distinct:
        return torch.randperm(rows * latents).view(rows, latents) / 7 - rows * latents / 14
    return torch.randint(-2, 3, (rows, latents)).float()


RULES: dict[str, Rule] = {
    "above": Above(0.0),
    "above each its own": Above(torch.linspace(-2, 2, 12)),
    "top k": TopK(3),
    "top k of a batch": BatchTopK(2.3, 11),
}


@pytest.mark.parametrize("rows", [1, 3, 11, 50])
@pytest.mark.parametrize("name", RULES)
def test_chunks_of_any_length_give_what_the_whole_batch_gives(name: str, rows: int) -> None:
    pre = pre_activations(11, 12)
    entries, _ = selected(RULES[name], pre, rows)
    assert entries == RULES[name].mask(pre).nonzero().tolist()
    assert entries  # nothing selected would be the same in any chunks


@pytest.mark.parametrize("name", RULES)
def test_an_empty_batch_has_no_entries(name: str) -> None:
    rule = BatchTopK(2.3, 0) if name == "top k of a batch" else RULES[name]
    pre = torch.empty(0, 12)
    assert selected(rule, pre, 3)[0] == []
    assert rule.mask(pre).shape == (0, 12)


@pytest.mark.parametrize("rule", [Above(0.0), TopK(1)])
def test_entries_of_a_large_batch_have_numbers_of_more_than_32_bits(rule: Rule) -> None:
    pre = -torch.ones(1, 2**16)
    pre[0, 5] = 1.0
    indices, values = rule.select([(60_000, pre)])
    assert indices.tolist() == [60_000 * 2**16 + 5]
    assert values.tolist() == [1.0]


def test_what_equals_the_threshold_is_not_above_it() -> None:
    pre = torch.tensor([[0.5, 1.0, 1.5], [1.0, 2.0, 3.0]])
    assert Above(1.0).mask(pre).tolist() == [[False, False, True], [False, True, True]]
    each = Above(torch.tensor([0.0, 1.0, 3.0]))
    assert each.mask(pre).tolist() == [[True, False, False], [True, True, False]]
    assert selected(each, pre, 1)[0] == [[0, 0], [1, 0], [1, 1]]


def sorted_rows(values: Tensor) -> Tensor:
    return values.sort(dim=-1, descending=True).values


@pytest.mark.parametrize("latents", [1, 5, 24, 64, 256, 512, 1000, 1024])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("distinct", [True, False])
def test_top_k_of_a_row_are_its_largest_entries(k: int, latents: int, distinct: bool) -> None:
    """Of 64 latents on, rows are searched in groups, for small k in groups of groups."""
    pre = pre_activations(9, latents, distinct)
    kept = min(k, latents)
    values, places = row_top_k(pre, kept)
    assert torch.equal(pre.gather(1, places), values)
    assert torch.equal(sorted_rows(values), pre.topk(kept).values)
    mask = TopK(k).mask(pre)
    assert (mask.sum(1) == kept).all()
    _, found = selected(TopK(k), pre, 4)
    assert torch.equal(sorted_rows(found.view(9, kept)), pre.topk(kept).values)


def test_top_k_holds_for_random_sizes_groups_and_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(150):
        rows, latents, k, group = (int(torch.randint(1, n, ())) for n in (5, 200, 6, 10))
        monkeypatch.setattr(selection, "GROUPS", (max(2, group), 2))
        pre = torch.randn(rows, latents)
        if torch.rand(()) < 0.5:
            pre = pre.mul(2).round()
        if torch.rand(()) < 0.2:
            pre[:, ::3] = -torch.inf
        k = min(k, latents)
        values, places = row_top_k(pre, k)
        assert torch.equal(sorted_rows(values), pre.topk(k).values)
        assert torch.equal(pre.gather(1, places), values)
        assert all(len(set(row)) == k for row in places.tolist())


def test_top_k_of_a_matrix_that_lies_otherwise_in_memory_is_the_same() -> None:
    pre = pre_activations(6, 256)
    assert torch.equal(TopK(2).mask(pre.T.contiguous().T), TopK(2).mask(pre))


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 17, 100])
@pytest.mark.parametrize("k", [0.01, 0.5, 2, 3.7, 11.9, 12, 20])
def test_a_batch_gets_k_entries_per_row_on_average_and_these_are_its_largest(
    k: float, rows: int, distinct: bool
) -> None:
    pre = pre_activations(100, 12, distinct)
    expected = min(1200, max(1, round(100 * k)))
    _, values = selected(BatchTopK(k, 100), pre, rows)
    assert torch.equal(sorted_rows(values), pre.flatten().topk(expected).values)
    mask = BatchTopK(k, 100).mask(pre)
    assert torch.equal(sorted_rows(pre[mask]), pre.flatten().topk(expected).values)


def test_a_batch_of_one_row_is_that_rows_top_k() -> None:
    pre = pre_activations(1, 40)
    assert torch.equal(BatchTopK(3, 1).mask(pre), TopK(3).mask(pre))
    assert selected(BatchTopK(3, 1), pre, 8)[0] == selected(TopK(3), pre, 8)[0]


class Device:
    """One of several devices, each a thread here."""

    def __init__(self, index: int, shown: list[Tensor | None], barrier: Barrier) -> None:
        self.index, self.n = index, len(shown)
        self._shown, self._barrier = shown, barrier
        self.sizes: list[tuple[int, ...]] = []

    def gathered(self, values: Tensor) -> Tensor:
        self.sizes.append(tuple(values.shape))
        self._shown[self.index] = values
        self._barrier.wait()
        found = torch.stack([each for each in self._shown if each is not None])
        self._barrier.wait()
        return found


def on_devices(n: int, do: Callable[[Device], T]) -> list[T]:
    """What each of n devices finds."""
    shown: list[Tensor | None] = [None] * n
    barrier = Barrier(n, timeout=20)
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(do, [Device(i, shown, barrier) for i in range(n)]))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("k", [0.05, 0.5, 3, 7.4, 12, 20])
def test_ranks_choose_together_what_one_would_from_all_their_rows(k: float, n: int) -> None:
    """Also where the rows of one rank are larger than those of another."""
    for growth in (0.0, 0.002):
        pre = pre_activations(36 * n, 12)
        pre += growth * torch.arange(len(pre)).unsqueeze(1)
        parts, expected = pre.split(36), BatchTopK(k, len(pre)).mask(pre)

        def choose(own: Device) -> tuple[Tensor, Any]:
            rule, part = BatchTopK(k, 36, n, own), parts[own.index]  # noqa: B023
            return rule.mask(part), selected(rule, part, 10)[0]

        masks, entries = zip(*on_devices(n, choose), strict=True)
        assert torch.equal(torch.cat(masks), expected)
        assert list(entries) == [part.nonzero().tolist() for part in expected.split(36)]


@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("make", [partial(TopK, 5), partial(TopK, 20), partial(BatchTopK, 2.5, 36)])
def test_parts_choose_together_what_one_would_from_all_their_latents(
    make: Any, n: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the latents of one are larger, and where many entries are equal."""
    monkeypatch.setattr(selection, "FEW", few)
    for growth in (0.0, 0.3301):
        pre = pre_activations(36, 24) + growth * torch.arange(24)
        parts, expected = pre.split(24 // n, 1), make().mask(pre)

        def choose(own: Device) -> tuple[Tensor, Any]:
            rule, part = make(among=own), parts[own.index]  # noqa: B023
            return rule.mask(part), selected(rule, part, 10)[0]

        masks, entries = zip(*on_devices(n, choose), strict=True)
        assert torch.equal(torch.cat(masks, 1), expected)
        assert list(entries) == [part.nonzero().tolist() for part in expected.split(24 // n, 1)]
    equal = torch.full((36, 24 // n), 0.25)
    chosen = on_devices(n, lambda own: make(among=own).mask(equal).sum())
    assert sum(chosen) == make().mask(torch.full((36, 24), 0.25)).sum()


def test_each_device_shows_as_many_entries_however_few_it_has() -> None:
    """The first of two has none, and the other two of which both are among the best six."""
    values = torch.tensor([[3.0, 1.0], [0.0, -5.0]])

    def choose(own: Device) -> tuple[list[tuple[int, ...]], list[list[bool]]]:
        chosen = chosen_among(values[:, : 2 * own.index], 6, own)
        return own.sizes, chosen.tolist()

    first, second = on_devices(2, choose)
    assert first == ([(2, 6)], [[], []])
    assert second == ([(2, 6)], [[True, True], [True, True]])


def test_what_a_device_shows_grows_with_its_share_of_the_chosen() -> None:
    """Of 400 entries among 4 devices each shows 200; where one has them all, 400."""
    alike = torch.rand(4, 1, 400).sort(descending=True).values
    unlike = alike + torch.tensor([10.0, 0.0, 0.0, 0.0]).view(4, 1, 1)
    for values, sizes in ((alike, [(1, 200)]), (unlike, [(1, 200), (1, 400)])):

        def choose(own: Device) -> tuple[list[tuple[int, ...]], Tensor]:
            chosen = chosen_among(values[own.index], 400, own)  # noqa: B023
            return own.sizes, values[own.index][chosen]  # noqa: B023

        seen, kept = zip(*on_devices(4, choose), strict=True)
        assert list(seen) == [sizes] * 4
        together = torch.cat(kept).sort(descending=True).values
        assert torch.equal(together, values.flatten().topk(400).values)


@pytest.mark.parametrize("rows", [64, 128])
def test_rows_that_mislead_the_first_guess_do_not_change_the_choice(rows: int) -> None:
    """The guess looks at each `len(chunk) // 32`-th row: here these are unlike the others."""
    for sign in (1, -1):
        pre = pre_activations(128, 16)
        pre[:: rows // 32] += sign * 1e4
        entries, _ = selected(BatchTopK(3, 128), pre, rows)
        assert entries == BatchTopK(3, 128).mask(pre).nonzero().tolist()


def test_nothing_is_lost_while_chunks_hold_fewer_entries_than_are_wanted() -> None:
    """Later rows are larger, so that all of the second chunk is wanted, and a guess loses some."""
    for _ in range(20):
        pre = pre_activations(192, 5) + 1e3 * torch.arange(192).unsqueeze(1)
        entries, _ = selected(BatchTopK(3, 192), pre, 80)
        assert entries == BatchTopK(3, 192).mask(pre).nonzero().tolist()


def test_a_batch_of_equal_entries_gets_as_many_as_there_is_room_for() -> None:
    pre = torch.full((100, 12), 0.25)
    for rows in (7, 100):
        assert len(selected(BatchTopK(1.5, 100), pre, rows)[0]) == 150
    assert BatchTopK(1.5, 100).mask(pre).sum() == 150


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 1.0])
def test_true_places_are_those_of_nonzero(density: float) -> None:
    bits = torch.rand(2100) < density
    for length in [*range(40), 64, 1000, 2000]:
        for offset in (0, 1, 8, 13):
            for step in (1, 2):
                mask = bits[offset : offset + step * length : step]
                if len(mask) == length:
                    assert torch.equal(true_places(mask), mask.nonzero().flatten())
