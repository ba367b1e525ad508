import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sae.functional import (
    cosine_similarity,
    explained_variance,
    fvu,
    l2_ratio,
    mse,
    relative_reconstruction_bias,
)

ALL = [cosine_similarity, explained_variance, fvu, l2_ratio, mse, relative_reconstruction_bias]
Function = Callable[[Tensor, Tensor], Tensor]


def test_mse_sums_over_d_in_and_averages_over_tokens() -> None:
    x = torch.zeros(2, 3, 10)
    assert mse(x, x + 2).item() == 4 * 10


def test_fvu_is_0_for_perfection_and_1_for_the_mean() -> None:
    x = 5 + torch.randn(20, 3, dtype=torch.float64)
    assert fvu(x, x).item() == 0
    assert fvu(x, x.mean(0).expand_as(x)).item() == pytest.approx(1)
    assert explained_variance(x, x).item() == 1


def test_fvu_survives_a_mean_far_larger_than_the_spread() -> None:
    x = 1000 + torch.randn(200, 3)
    x_hat = x + 0.1 * torch.randn(200, 3)
    error = (x.double() - x_hat.double()).square().sum()
    centred = (x.double() - x.double().mean(0)).square().sum()
    assert fvu(x, x_hat).item() == pytest.approx((error / centred).item(), rel=1e-7)


@pytest.mark.parametrize("alpha", [0.25, 0.7, 1.0, 1.5])
def test_bias_of_a_scaled_copy_is_the_scale(alpha: float) -> None:
    x = torch.randn(100, 1, dtype=torch.float64)
    assert relative_reconstruction_bias(x, alpha * x).item() == pytest.approx(alpha)


def test_bias_is_where_rescaling_the_reconstruction_is_best() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    x_hat = 0.6 * x + 0.5 * torch.randn_like(x)
    gamma = relative_reconstruction_bias(x, x_hat)
    best = mse(x, x_hat / gamma)
    assert best < mse(x, x_hat / (gamma * 1.01))
    assert best < mse(x, x_hat / (gamma * 0.99))
    assert relative_reconstruction_bias(x, x_hat / gamma).item() == pytest.approx(1)


def test_bias_is_not_the_l2_ratio_where_directions_are_wrong() -> None:
    # A projection onto the first axis: shorter than x, and yet best left at its length.
    x = torch.tensor([[3.0, 4.0], [3.0, -4.0]])
    x_hat = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    assert relative_reconstruction_bias(x, x_hat).item() == 1
    assert l2_ratio(x, x_hat).item() == pytest.approx(3 / 5)


def test_l2_ratio_leaves_out_tokens_without_length() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert l2_ratio(x, torch.full((2, 2), 10.0)).item() == pytest.approx(math.sqrt(8))


def test_cosine_of_zero_reconstructions_is_0_and_zero_activations_are_left_out() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    x_hat = torch.tensor([[30.0, 40.0], [0.0, 0.0], [1.0, 1.0]])
    assert cosine_similarity(x, x_hat).item() == pytest.approx(1 / 2)


def test_cosine_ignores_length_and_sees_the_sign() -> None:
    x = torch.randn(10, 4)
    assert cosine_similarity(x, 7 * x).item() == pytest.approx(1)
    assert cosine_similarity(x, -x).item() == pytest.approx(-1)


@pytest.mark.parametrize("function", ALL)
def test_leading_axes_are_all_token_axes(function: Function) -> None:
    x, x_hat = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(function(x, x_hat), function(x.view(24, 5), x_hat.view(24, 5)))


@pytest.mark.parametrize("function", [cosine_similarity, l2_ratio, mse, fvu])
def test_gradient_is_right(function: Function) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x_hat = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, x_hat))


@pytest.mark.parametrize("function", ALL)
def test_gradient_is_finite_where_a_token_is_zero(function: Function) -> None:
    x, x_hat = torch.randn(4, 3), torch.randn(4, 3)
    x[0] = x_hat[1] = 0
    x.requires_grad_(), x_hat.requires_grad_()
    function(x, x_hat).backward()
    assert x.grad is not None
    assert x_hat.grad is not None
    assert x.grad.isfinite().all()
    assert x_hat.grad.isfinite().all()


@pytest.mark.parametrize("function", ALL)
def test_shape_mismatch_is_refused_with_both_shapes(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as for users
    with pytest.raises(ValueError, match=r"`x` and `x_hat`.*got \(2, 4\) and \(2, 1\): pass"):
        function(torch.ones(2, 4), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"but got \(\) and \(\)"):
        function(torch.tensor(1.0), torch.tensor(1.0))
