import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.penalties import (
    L1,
    Log,
    Penalty,
    Power,
    Sqrt,
    Tanh,
    batch_penalty,
    describe,
    from_description,
    plain_arguments,
)
from lightning_sae.functional.sparse.code import Code, Layout, encode
from lightning_sae.functional.sparse.selection import Above

ALL = [
    L1(),
    Power(0.5),
    Power(0.3),
    Power(0.7, epsilon=0.1),
    Power(1.0),
    Sqrt(),
    Sqrt(epsilon=0.5),
    Log(),
    Log(20.0),
    Tanh(),
    Tanh(0.5),
]


def slope(penalty: Penalty, f: Tensor) -> Tensor:
    f = f.clone().requires_grad_()
    return torch.autograd.grad(penalty(f).sum(), f)[0]


@pytest.mark.parametrize("penalty", ALL, ids=str)
def test_nothing_costs_nothing_and_has_a_finite_slope(penalty: Penalty) -> None:
    nothing = torch.zeros(19)
    assert torch.equal(penalty(nothing), nothing)
    assert slope(penalty, nothing).isfinite().all()


@pytest.mark.parametrize("penalty", ALL, ids=str)
def test_more_costs_more_but_never_more_than_in_proportion(penalty: Penalty) -> None:
    f = torch.linspace(0, 3, 50, dtype=torch.float64)
    cost = penalty(f)
    assert (cost.diff() > 0).all()
    assert (cost.diff().diff() < 1e-12).all()


@pytest.mark.parametrize(
    ("penalty", "cost", "cost_slope"),
    [
        (L1(), lambda f: f, lambda f: 1.0),
        (
            Sqrt(),
            lambda f: math.sqrt(f + 1e-3) - math.sqrt(1e-3),
            lambda f: 0.5 / (f + 1e-3) ** 0.5,
        ),
        (Power(0.3, 0.2), lambda f: (f + 0.2) ** 0.3 - 0.2**0.3, lambda f: 0.3 * (f + 0.2) ** -0.7),
        (Log(3.0), lambda f: math.log(1 + 3 * f), lambda f: 3 / (1 + 3 * f)),
        (Tanh(2.0), lambda f: math.tanh(2 * f), lambda f: 2 / math.cosh(2 * f) ** 2),
    ],
    ids=["l1", "sqrt", "power", "log", "tanh"],
)
def test_values_and_slopes_are_the_closed_forms(penalty, cost, cost_slope) -> None:
    f = torch.tensor([1e-6, 0.01, 0.3, 1.0, 7.0], dtype=torch.float64)
    expected = [cost(v) for v in f.tolist()]
    torch.testing.assert_close(penalty(f), torch.tensor(expected, dtype=torch.float64))
    expected = [cost_slope(v) for v in f.tolist()]
    torch.testing.assert_close(slope(penalty, f), torch.tensor(expected, dtype=torch.float64))


def test_slopes_at_zero_are_those_that_the_docstrings_say() -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    assert slope(L1(), nothing).item() == 1
    assert slope(Sqrt(), nothing).item() == pytest.approx(15.8, abs=0.05)
    assert slope(Power(0.3, 0.2), nothing).item() == pytest.approx(0.3 * 0.2**-0.7)


def test_a_power_of_small_activations_does_not_drown_in_rounding() -> None:
    f = torch.tensor([1e-9, 1e-8])
    torch.testing.assert_close(Sqrt()(f), f / (2 * math.sqrt(1e-3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("penalty", [L1(), Sqrt(), Log(), Tanh()], ids=str)
def test_it_is_summed_over_latents_and_averaged_over_the_batch(
    penalty: Penalty, weighted: bool, dense: bool
) -> None:
    x, W_enc, norms = torch.randn(5, 3), torch.randn(3, 7), torch.rand(7) + 0.5
    code = encode(x, W_enc, torch.zeros(7), Above(0.0), Layout(dense))
    total = 0.0
    for row in (x @ W_enc).relu():
        for j in range(7):
            total += penalty(row[j] * (norms[j] if weighted else 1.0)).item()
    cost = batch_penalty(penalty, code, norms if weighted else None)
    assert cost.item() == pytest.approx(total / 5, rel=1e-5)


def test_longer_decoder_rows_with_smaller_activations_cost_the_same() -> None:
    f, norms = torch.rand(4, 6) * (torch.rand(4, 6) > 0.5), torch.rand(6) + 0.1
    stretch = torch.rand(6) + 0.1
    cost = batch_penalty(Log(5.0), Code.of_matrix(f), norms)
    torch.testing.assert_close(
        batch_penalty(Log(5.0), Code.of_matrix(f / stretch), norms * stretch), cost
    )


@pytest.mark.parametrize("penalty", ALL, ids=str)
def test_a_penalty_is_built_again_from_its_description(penalty: Penalty) -> None:
    description = describe(penalty)
    assert (
        description["class_path"] == f"lightning_sae.functional.penalties.{type(penalty).__name__}"
    )
    again = from_description(description)
    assert type(again) is type(penalty)
    assert again == penalty


def test_a_description_may_leave_out_what_is_by_default() -> None:
    path = "lightning_sae.functional.penalties."
    assert from_description({"class_path": path + "Sqrt"}) == Sqrt()
    assert from_description({"class_path": path + "Log", "init_args": {"a": 2.0}}) == Log(2.0)


@dataclass(frozen=True)
class Mine(Penalty):
    """A user's own."""

    def __call__(self, f: Tensor) -> Tensor:
        return f


@pytest.mark.parametrize("name", [f"{__name__}.Mine", "os.system", "Sqrt"])
def test_nothing_but_this_packages_penalties_is_built(name: str) -> None:
    with pytest.raises(ValueError, match="a penalty of this package, one of .* but got"):
        from_description({"class_path": name})


def test_arguments_become_plain_values() -> None:
    plain = plain_arguments({"lr": 0.1, "penalty": Log(2.0), "k": None})
    assert plain == {"lr": 0.1, "penalty": describe(Log(2.0)), "k": None}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Power(0.0), r"`p` to be in \(0, 1\] .* p=0.0"),
        (lambda: Power(1.1), r"`p` to be in \(0, 1\] .* p=1.1"),
        (lambda: Sqrt(epsilon=0.0), "`epsilon` to be positive"),
        (lambda: Sqrt(0.7), "`p` of `Sqrt` to be 0.5 but got 0.7: use `Power`"),
        (lambda: Log(0.0), "`a` to be positive but got 0"),
        (lambda: Tanh(-1.0), "`c` to be positive but got -1"),
    ],
)
def test_parameters_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
