import pytest
import torch
from torch import Tensor

from lightning_sae.functional.sparse.patterns import DensePattern, SparsePattern

ACTIVE = [(0, 4), (0, 1), (2, 1), (2, 0), (2, 4), (3, 2)]  # row 1 and latent 3 have none
SHAPE = (4, 5)


def pattern(active: list[tuple[int, int]] = ACTIVE) -> SparsePattern:
    flat = torch.tensor([row * SHAPE[1] + latent for row, latent in active], dtype=torch.int64)
    return SparsePattern.from_flat(flat, SHAPE)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small whole numbers, of which every precision gives the same sums."""
    return torch.randint(-3, 4, shape).to(dtype)


def test_flat_indices_become_rows_and_latents() -> None:
    assert pattern().rows.tolist() == [row for row, _ in ACTIVE]
    assert pattern().latents.tolist() == [latent for _, latent in ACTIVE]
    assert pattern().row_starts.tolist() == [0, 2, 2, 5, 6]


def test_entries_are_found_latent_by_latent() -> None:
    order, starts = pattern().by_latent
    assert pattern().latents[order].tolist() == sorted(latent for _, latent in ACTIVE)
    assert starts.tolist() == [0, 1, 3, 4, 4, 6]


def test_flat_indices_may_be_larger_than_32_bits() -> None:
    shape = (70_000, 2**16)
    rows, latents = torch.tensor([0, 40_000, 69_999]), torch.tensor([7, 0, 2**16 - 1])
    found = SparsePattern.from_flat(rows * shape[1] + latents, shape)
    assert found.rows.tolist() == rows.tolist()
    assert found.latents.tolist() == latents.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("active", [ACTIVE, ACTIVE[-1:], []])
@pytest.mark.parametrize("into_memory", [True, False])
def test_products_are_sums_over_active_entries(
    into_memory: bool,
    active: list[tuple[int, int]],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not into_memory:  # as on a machine whose torch has no such product
        monkeypatch.setattr(
            "lightning_sae.functional.sparse.patterns.sums_into_memory", lambda _: False
        )
    on = pattern(active)
    weights = numbers(len(active), dtype=dtype)
    left, right = numbers(SHAPE[0], 3, dtype=dtype), numbers(SHAPE[1], 3, dtype=dtype)
    for_rows, for_latents = torch.zeros_like(left), torch.zeros_like(right)
    row_sums = torch.zeros(SHAPE[0], dtype=dtype)
    for weight, (row, latent) in zip(weights, active, strict=True):
        for_rows[row] += weight * right[latent]
        for_latents[latent] += weight * left[row]
        row_sums[row] += weight
    sampled = [left[row] @ right[latent] for row, latent in active]
    assert torch.equal(on.sum_for_rows(weights, right), for_rows)
    assert torch.equal(on.sum_for_latents(weights, left), for_latents)
    assert torch.equal(on.row_sums(weights), row_sums)
    assert torch.equal(on.sampled_product(left, right), torch.tensor(sampled, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_in_half_precision_do_not_stop_growing(dtype: torch.dtype) -> None:
    """One by one, bfloat16 gets no further than 256 and float16 no further than 2048."""
    n = 4096
    row = SparsePattern.from_flat(torch.arange(n), (1, n))
    assert row.row_sums(torch.ones(n, dtype=dtype)).item() == n


def test_parts_have_the_entries_of_their_latents_in_both_layouts() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    group = torch.tensor([2, 0, 2, 2, 0])
    whole = pattern().to_dense(values)
    sparse = pattern().parted(values, group, 3)
    dense = DensePattern(whole != 0).parted(whole, group, 3)
    for index in range(3):
        expected = whole * (group == index)
        (part, on), (matrix, own) = sparse[index], dense[index]
        assert torch.equal(on.to_dense(part), expected)
        assert on.rows.tolist() == sorted(on.rows.tolist())
        assert torch.equal(matrix, expected)
        assert torch.equal(own.mask, expected != 0)


def test_firings_count_values_that_are_not_zero() -> None:
    values = torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0, 0.0])
    expected = [1, 1, 0, 0, 2]
    assert pattern().firings(values).tolist() == expected
    matrix = pattern().to_dense(values)
    assert DensePattern(matrix != 0).firings(matrix).tolist() == expected
