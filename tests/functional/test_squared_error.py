"""The squared error of training: values and gradients."""

import torch
from torch.autograd import gradcheck

from lightning_sae.functional.squared_error import squared_errors


def test_it_is_the_sum_over_d_in_and_so_are_its_gradients():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x_hat = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(squared_errors(x, x_hat), ((x - x_hat) ** 2).sum(1))
    assert gradcheck(squared_errors, (x, x_hat))
    assert gradcheck(squared_errors, (x.detach(), x_hat))


def test_a_perfect_reconstruction_has_a_gradient_of_zero():
    x_hat = torch.ones(2, 3, requires_grad=True)
    squared_errors(torch.ones(2, 3), x_hat).sum().backward()
    assert torch.equal(x_hat.grad, torch.zeros(2, 3))
