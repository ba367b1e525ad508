import itertools

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.assignment import optimal_matching


def largest_sum(similarity: Tensor) -> float:
    """By trying every matching."""
    wide = similarity if similarity.shape[0] <= similarity.shape[1] else similarity.T
    rows, columns = wide.shape
    table = wide.double().tolist()
    return max(
        sum(table[row][column] for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(columns), rows)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (6, 6), (3, 7), (7, 3)])
@pytest.mark.parametrize("ties", [False, True])
def test_no_matching_has_a_larger_sum(shape: tuple[int, int], ties: bool) -> None:
    for _ in range(20):
        similarity = torch.randn(shape).round() if ties else torch.randn(shape)
        rows, columns = optimal_matching(similarity)
        assert len(rows) == len(columns) == min(shape)
        assert len(rows.unique()) == len(columns.unique()) == min(shape)
        assert (rows.diff() > 0).all()
        found = similarity.double()[rows, columns].sum().item()
        assert found == pytest.approx(largest_sum(similarity), abs=1e-9)


def test_a_permutation_is_found_again() -> None:
    order = torch.randperm(200)
    rows, columns = optimal_matching(torch.eye(200)[order] + 0.5 * torch.rand(200, 200))
    assert torch.equal(rows, torch.arange(200))
    assert torch.equal(columns, order)


def test_nothing_is_matched_with_nothing() -> None:
    assert [*map(len, optimal_matching(torch.zeros(0, 3)))] == [0, 0]
    assert [*map(len, optimal_matching(torch.zeros(3, 0)))] == [0, 0]


@pytest.mark.parametrize("entry", [torch.nan, torch.inf])
def test_entries_that_are_not_finite_are_refused(entry: float) -> None:
    with pytest.raises(ValueError, match="`similarity` to be finite"):
        optimal_matching(torch.tensor([[0.0, entry]]))
