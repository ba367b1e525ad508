import pytest
import torch
from torch import Tensor

from lightning_sae.functional.jumprelu import jumprelu, step

# Around thresholds of .5, -.2 and 0, in windows .4 wide: inside, at the threshold, outside.
V = torch.tensor([[0.55, -0.3, 0.1], [0.5, -0.2, 0.0], [0.45, -0.1, -0.1], [2.0, 1.0, -3.0]])
THETA = torch.tensor([0.5, -0.2, 0.0])
BANDWIDTH = 0.4


def naive_values(jump: bool) -> Tensor:
    found = [
        [(v if jump else 1.0) if v > t else 0.0 for v, t in zip(row, THETA.tolist(), strict=True)]
        for row in V.tolist()
    ]
    return torch.tensor(found)


def naive_theta_gradient(upstream: Tensor, jump: bool) -> Tensor:
    """Equations 10 to 12 of the paper, one pair at a time."""
    gradient = [0.0] * 3
    for i in range(4):
        for j in range(3):
            v, theta = V[i, j].item(), THETA[j].item()
            inside = 1.0 if abs((v - theta) / BANDWIDTH) < 0.5 else 0.0
            pseudo = -(theta if jump else 1.0) / BANDWIDTH * inside
            gradient[j] += pseudo * upstream[i, j].item()
    return torch.tensor(gradient)


@pytest.mark.parametrize("jump", [True, False])
def test_values_and_pseudo_derivatives_are_those_of_the_paper(jump: bool) -> None:
    v, theta = V.clone().requires_grad_(), THETA.clone().requires_grad_()
    found = (jumprelu if jump else step)(v, theta, BANDWIDTH)
    assert torch.equal(found, naive_values(jump))
    upstream = torch.randn(4, 3)
    found.backward(upstream)
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, naive_theta_gradient(upstream, jump))
    assert theta.grad.count_nonzero() == (2 if jump else 3)  # a jump at 0 has no height
    if jump:
        assert v.grad is not None
        assert torch.equal(v.grad, torch.where(naive_values(jump) != 0, upstream, 0.0))
    else:
        assert v.grad is None


@pytest.mark.parametrize("function", [jumprelu, step])
def test_what_is_a_window_away_gives_no_gradient(function) -> None:
    theta = torch.zeros(5, requires_grad=True)
    v = torch.tensor([-1.0, -0.2, 0.2, 1.0, 30.0])
    function(v, theta + 0.0, 0.4).sum().backward()
    assert theta.grad is not None
    assert theta.grad.tolist() == [0.0] * 5


def test_a_threshold_of_zero_is_a_relu() -> None:
    v = torch.randn(50, requires_grad=True)
    jumprelu(v, torch.zeros(50), 0.1).sum().backward()
    assert torch.equal(jumprelu(v, torch.zeros(50), 0.1), v.relu())
    assert v.grad is not None
    assert torch.equal(v.grad, (v > 0).float())


def test_the_mean_pseudo_derivative_is_that_of_the_expected_count() -> None:
    """What the window estimates: -p(theta), by which the share of inputs above theta falls."""
    v = torch.rand(200_000, dtype=torch.float64) * 2  # of density one half
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    step(v, theta, 0.2).mean().backward()
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-0.5, rel=0.03)
