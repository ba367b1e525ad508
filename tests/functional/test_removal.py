"""Removing low activations, against loops over tokens and latents."""

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.removal import (
    firings,
    ranks_among_firing,
    without_below,
    without_lowest,
)

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.99)


def latents(*shape: int, ties: bool = False) -> Tensor:
    """Some activations, about half of them zero; with ties only a few different values."""
    f = torch.relu(torch.randn(*shape))
    return (3 * f).round() / 3 if ties else f


def lowest_removed_by_loop(f: Tensor, k: int) -> Tensor:
    left = f.clone()
    for row in left.view(-1, f.shape[-1]):
        for _ in range(k):
            firing = [(float(value), j) for j, value in enumerate(row) if value > 0]
            if firing:
                row[min(firing)[1]] = 0.0
    return left


# Removal.


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3, 50])
def test_the_k_lowest_of_each_token_go(k: int, ties: bool) -> None:
    f = latents(4, 5, 12, ties=ties)
    left = without_lowest(f, k)
    assert torch.equal(left, lowest_removed_by_loop(f, k))
    assert torch.equal((left > 0).sum(-1), ((f > 0).sum(-1) - k).clamp_min(0))


def test_known_ranks_change_nothing() -> None:
    f = latents(20, 12, ties=True)
    assert torch.equal(without_lowest(f, 2, ranks_among_firing(f)), without_lowest(f, 2))


def test_ranks_count_the_firings_of_the_token_that_come_before() -> None:
    f = torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ranks_among_firing(f).tolist() == [[0, 2, 1, 3, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("each", [False, True])
def test_what_is_below_the_threshold_goes_and_what_is_equal_stays(each: bool) -> None:
    f = latents(30, 6, ties=True)
    bounds = [0.0, 1 / 3, 2 / 3, 1.0, 4 / 3, 9.0] if each else [2 / 3] * 6
    left = without_below(f, torch.tensor(bounds) if each else bounds[0])
    for token in range(30):
        for j in range(6):
            bound = float(torch.tensor(bounds[j]))  # as float32 has it
            assert left[token, j] == (f[token, j] if f[token, j] >= bound else 0)


def test_nothing_is_removed_at_level_zero() -> None:
    f = latents(7, 9)
    found = firings([f])
    assert torch.equal(without_lowest(f, 0), f)
    assert torch.equal(without_below(f, found.global_threshold(0.0)), f)
    assert torch.equal(without_below(f, found.quantile_thresholds(0.0)), f)
    assert torch.equal(without_below(f, found.share_of_maximum(0.0) * found.maxima), f)


def test_codes_that_are_all_zero_stay_so() -> None:
    f = torch.zeros(3, 4)
    found = firings([f])
    assert torch.equal(without_lowest(f, 2), f)
    assert found.global_threshold(0.5) == found.share_of_maximum(0.5) == 0.0
    assert found.lowest_per_token(0.5) == 0
    assert torch.equal(found.quantile_thresholds(0.5), torch.zeros(4))


def test_a_negative_k_is_refused() -> None:
    with pytest.raises(ValueError, match="`k` to be at least 0 but got -1"):
        without_lowest(latents(2, 3), -1)


# What levels follow from.


def test_batches_gather_to_what_one_batch_gives() -> None:
    f = latents(40, 7)
    f[:, 3] = 0
    together, apart = firings([f]), firings(f.split(9))
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)
    for j in range(7):
        own = sorted(value for value in f[:, j].tolist() if value > 0)
        start = int(together.counts[:j].sum())
        assert together.values[start : start + len(own)].tolist() == own
        assert together.counts[j] == len(own)
        assert together.maxima[j] == max(own, default=0.0)
    assert together.per_token.tolist() == [int((row > 0).sum()) for row in f]


@pytest.mark.parametrize("share", SHARES)
def test_each_threshold_removes_its_share_rounded_down(share: float) -> None:
    f = latents(200, 7)
    found = firings([f])
    n = int((f > 0).sum())
    for threshold in (found.global_threshold(share), found.share_of_maximum(share) * found.maxima):
        removed = n - int((without_below(f, threshold) > 0).sum())
        assert removed == pytest.approx(int(share * n), abs=1)  # maxima times quotients round
    left = without_below(f, found.quantile_thresholds(share))
    for j in range(7):
        own = int((f[:, j] > 0).sum())
        assert int((left[:, j] > 0).sum()) == own - int(share * own)


def test_firings_tied_with_the_threshold_stay() -> None:
    f = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
    found = firings([f])
    assert found.global_threshold(0.5) == 1.0
    assert torch.equal(without_below(f, found.quantile_thresholds(0.5)), f)
    assert found.global_threshold(0.75) == 2.0


@pytest.mark.parametrize("share", SHARES)
def test_k_is_the_whole_number_that_removes_the_share_most_nearly(share: float) -> None:
    f = latents(50, 12)
    wished = share * float((f > 0).sum())
    removed = [float((f > 0).sum() - (without_lowest(f, k) > 0).sum()) for k in range(13)]
    best = min(range(13), key=lambda k: abs(removed[k] - wished))
    assert firings([f]).lowest_per_token(share) == best


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    found = firings([latents(5, 4)])
    for level in (
        found.global_threshold,
        found.quantile_thresholds,
        found.share_of_maximum,
        found.lowest_per_token,
    ):
        with pytest.raises(ValueError, match="`share` to be in \\[0, 1\\) but got"):
            level(share)
