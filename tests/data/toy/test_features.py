import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_sae.data.toy.features import (
    _crowding,
    constant,
    per_feature,
    repelled,
    unit_directions,
    welch_bound,
)
from lightning_sae.functional.geometry import random_unit_rows, unit_rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_cosine(w: Tensor) -> float:
    cosines = w.double() @ w.double().T
    return (cosines - torch.diag(cosines.diag())).abs().max().item()


@pytest.mark.parametrize(("n", "d"), [(4, 50), (20, 20), (1, 1)])
def test_orthogonal_directions_are_orthonormal(n: int, d: int) -> None:
    w = unit_directions("orthogonal", n, d, 0.1, generator())
    torch.testing.assert_close(w @ w.T, torch.eye(n), atol=1e-6, rtol=0)
    other = unit_directions("orthogonal", n, d, 0.1, generator(1))
    assert n == d == 1 or not torch.allclose(w, other, atol=0.01)


@pytest.mark.parametrize(
    ("n", "d", "bound"),
    [(20, 19, 0.06), (20, 50, 0.01), (20, 50, 0.5), (40, 20, 0.2), (300, 64, 0.25), (2, 2, 0.1)],
)
def test_nearly_orthogonal_directions_keep_to_the_bound(n: int, d: int, bound: float) -> None:
    w = unit_directions("nearly_orthogonal", n, d, bound, generator())
    torch.testing.assert_close(w.norm(dim=1), torch.ones(n))
    assert largest_cosine(w) <= bound + 1e-6
    assert largest_cosine(unit_directions("random", n, d, bound, generator())) > min(bound, 0.2)


def test_the_push_is_the_gradient_of_the_sum_of_squares_beyond_the_aim() -> None:
    w = random_unit_rows(30, 5, generator()).double().requires_grad_()
    cosines = (w @ w.T).masked_fill(torch.eye(30, dtype=torch.bool), 0.0)
    loss = (cosines.abs() - 0.3).relu().square().sum()
    loss.backward()
    largest, excess, push = _crowding(w.detach(), 0.3, chunk=7)
    assert largest == pytest.approx(cosines.abs().max().item())
    assert excess == pytest.approx(loss.item())
    torch.testing.assert_close(4 * push, w.grad)


def test_welch_bound_is_reached_by_the_simplex() -> None:
    simplex = unit_rows(torch.eye(4) - 0.25)  # four directions in three dimensions
    assert largest_cosine(simplex) == pytest.approx(welch_bound(4, 3), rel=1e-6)


def test_a_bound_that_nothing_can_keep_is_refused_with_the_least() -> None:
    least = f"{1 / 19:.6f}"
    with pytest.raises(ValueError, match=f"at least {least}, the Welch bound .* but got 0.05: rai"):
        unit_directions("nearly_orthogonal", 20, 19, 0.05, generator())


def test_a_bound_that_repulsion_cannot_reach_is_refused_with_what_it_reached() -> None:
    start = random_unit_rows(40, 20, generator())
    with pytest.raises(
        ValueError, match=r"but got 0.17: the smallest bound .* is 0.\d+.*`d_in`"
    ) as e:
        repelled(start, 0.17, patience=20)
    reached = float(re.findall(r"is (0\.\d+)\.", str(e.value))[0])
    assert 0.17 < reached < largest_cosine(start) / 2
    assert largest_cosine(repelled(start, reached)) <= reached + 1e-6


def test_random_directions_are_uniform_on_the_sphere() -> None:
    w = unit_directions("random", 20_000, 3, 0.1, generator())
    torch.testing.assert_close(w.norm(dim=1), torch.ones(20_000))
    assert (w.mean(0).abs() < 5 / (3 * 20_000) ** 0.5).all()
    assert ((w.square().mean(0) - 1 / 3).abs() < 0.015).all()


def test_given_directions_are_scaled_to_unit_norm() -> None:
    given = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    w = unit_directions(given, 2, 2, 0.1, generator())
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("orthogonal", r"`n_features` to be at most d_in=2 .*but got 3: set `directions`"),
        ("nearly", r"`directions` to be `orthogonal`.*but got 'nearly'"),
        (torch.ones(2, 3), r"shape \[n_features, d_in\] = \(3, 2\) but got \(2, 3\): set"),
        (torch.tensor([[1.0, 0], [0, 1], [0, 0]]), r"finite rows that are not zero"),
        (torch.tensor([[1.0, 0], [0, 1], [torch.nan, 0]]), r"finite rows that are not zero"),
    ],
)
def test_directions_that_cannot_be_are_refused(kind: str | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_directions(kind, 3, 2, 0.1, generator())  # type: ignore[arg-type]


def test_a_number_for_each_feature() -> None:
    assert per_feature("p", 0.25, 3).tolist() == [0.25] * 3
    assert per_feature("p", [0.5, 0.25], 2).tolist() == [0.5, 0.25]
    linear = per_feature("p", {"linear": (20.0, 1.0)}, 20)
    torch.testing.assert_close(linear, torch.arange(20.0, 0.0, -1.0))
    assert per_feature("p", {"zipf": (0.3, 0.1)}, 1).tolist() == pytest.approx([0.3])


def test_zipf_is_a_straight_line_in_logarithms_from_first_to_last() -> None:
    p = per_feature("p", {"zipf": (0.4, 5e-4)}, 1000)
    assert p[0].item() == pytest.approx(0.4)
    assert p[-1].item() == pytest.approx(5e-4)
    slopes = (p[1:] / p[:-1]).log() / ((torch.arange(2.0, 1001) / torch.arange(1.0, 1000)).log())
    torch.testing.assert_close(slopes, slopes[0].expand(999), rtol=1e-2, atol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.1, 0.2], r"`p` to have 3 numbers, one for each feature .* but got 2"),
        ({"zopf": (1.0, 0.1)}, r"`p` .*`linear` or `zipf` .*but got \{'zopf'"),
        ({"linear": (1.0,)}, r"`p` .*first feature's number and the last one's"),
        ({"linear": (1.0, 2.0), "zipf": (1.0, 2.0)}, r"`p` .*but got"),
        ({}, r"`p` .*but got \{\}"),
        ({"zipf": (1.0, 0.0)}, r"`p` to have positive ends for `zipf`"),
    ],
)
def test_numbers_that_fit_no_form_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_feature("p", value, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [2.0, [0.0, 3.0, 4.0]])
def test_a_constant_is_given_or_of_random_direction(bias: float | Sequence[float]) -> None:
    vector = constant(bias, 3, generator())
    assert vector.norm().item() == pytest.approx(2.0 if isinstance(bias, float) else 5.0)
    assert torch.equal(vector, constant(bias, 3, generator(1))) == isinstance(bias, list)
    with pytest.raises(ValueError, match="`bias` to be a norm or d_in=4 numbers but got 3"):
        constant([1.0, 2.0, 3.0], 4, generator())
