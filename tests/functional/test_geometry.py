import pytest
import torch

from lightning_sae.functional.geometry import random_unit_rows, unit_rows, without_parallel_part


def test_unit_rows_keep_their_direction_and_have_norm_one():
    w = torch.randn(50, 7) * torch.logspace(-6, 6, 50)[:, None]
    normal = unit_rows(w)
    for row, result in zip(w.double(), normal.double(), strict=True):
        torch.testing.assert_close(result, row / row.pow(2).sum().sqrt(), atol=1e-6, rtol=0)


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_random_rows_are_unit_and_spread_over_all_directions():
    w = random_unit_rows(20_000, 3)
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(20_000))
    # On the sphere in three dimensions a coordinate is uniform on [-1, 1]: variance 1/3.
    assert w.mean(0).abs().max() < 0.03
    torch.testing.assert_close(w.T @ w / len(w), torch.eye(3) / 3, atol=0.02, rtol=0)


def test_random_rows_come_from_the_generator_given():
    before = torch.get_rng_state()
    first = random_unit_rows(4, 5, torch.Generator().manual_seed(1))
    assert torch.equal(first, random_unit_rows(4, 5, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, random_unit_rows(4, 5, torch.Generator().manual_seed(2)))
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_left_of_a_gradient_is_orthogonal_to_the_row_and_differs_by_a_multiple_of_it():
    w = unit_rows(torch.randn(6, 4, dtype=torch.float64))
    gradient = torch.randn(6, 4, dtype=torch.float64)
    left = without_parallel_part(gradient, w)
    for i in range(6):
        assert torch.dot(left[i], w[i]).item() == pytest.approx(0, abs=1e-14)
        removed = gradient[i] - left[i]
        torch.testing.assert_close(removed, torch.dot(removed, w[i]) * w[i])


def test_a_gradient_orthogonal_to_the_row_is_left_alone():
    w = torch.tensor([[0.0, 1.0, 0.0]])
    gradient = torch.tensor([[3.0, 0.0, -2.0]])
    assert torch.equal(without_parallel_part(gradient, w), gradient)
