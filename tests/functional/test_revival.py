from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.revival import auxk, ghost_gradients

LOSSES = [lambda e, v, W: auxk(e, v, W, 2), ghost_gradients]


def naive_auxk(residual: Tensor, pre: Tensor, W_dec: Tensor, k: int) -> float:
    mean = [sum(column) / len(residual) for column in residual.T.tolist()]
    left = spread = 0.0
    for e, v in zip(residual.tolist(), pre.tolist(), strict=True):
        rebuilt = [0.0] * len(e)
        floor = -(sum(a * a for a in e) ** 0.5)
        for j in sorted(range(len(v)), key=lambda j: -v[j])[:k]:
            rebuilt = [
                a + max(v[j], floor) * w for a, w in zip(rebuilt, W_dec[j].tolist(), strict=True)
            ]
        left += sum((a - b) ** 2 for a, b in zip(e, rebuilt, strict=True))
        spread += sum((a - b) ** 2 for a, b in zip(e, mean, strict=True))
    return left / spread


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_auxk_is_the_share_that_the_strongest_dead_latents_leave(k: int) -> None:
    residual, pre, W_dec = torch.randn(6, 4), torch.randn(6, 5), torch.randn(5, 4)
    loss = auxk(residual, pre, W_dec, k)
    assert loss.item() == pytest.approx(naive_auxk(residual, pre, W_dec, k), rel=1e-5)


def test_auxk_does_not_depend_on_the_unit_of_activations() -> None:
    residual, pre, W_dec = torch.randn(6, 4), torch.randn(6, 5), torch.randn(5, 4)
    torch.testing.assert_close(
        auxk(100 * residual, 100 * pre, W_dec, 3), auxk(residual, pre, W_dec, 3)
    )


@pytest.mark.parametrize("bias", [-1e6, -1e18])
def test_auxk_stays_bounded_and_moves_latents_whatever_their_bias(bias: float) -> None:
    residual, W_dec = torch.randn(64, 8), torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    pre = (bias + torch.randn(64, 5)).requires_grad_()
    loss = auxk(residual, pre, W_dec, 3)
    # Three unit rows, none longer than the error: a rebuilt row is at most three errors long.
    assert loss < (1 + 3) ** 2 * residual.pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()
    loss.backward()
    assert pre.grad is not None
    assert pre.grad.abs().sum() > 0
    assert pre.grad.abs().max() < 1


def test_auxk_moves_latents_whose_pre_activations_are_all_negative() -> None:
    """As those of a dead latent are wherever latents are pre-activations above 0."""
    pre = (-1 - torch.rand(6, 5)).requires_grad_()
    W_dec = torch.randn(5, 4, requires_grad=True)
    auxk(torch.randn(6, 4), pre, W_dec, 5).backward()
    assert pre.grad is not None
    assert (pre.grad != 0).all()
    assert W_dec.grad is not None
    assert (W_dec.grad != 0).all()


@pytest.mark.parametrize("residual", [torch.randn(1, 4), torch.ones(3, 4), torch.zeros(3, 4)])
def test_auxk_of_a_residual_that_does_not_vary_is_nothing(residual: Tensor) -> None:
    pre = torch.randn(len(residual), 5, requires_grad=True)
    loss = auxk(residual, pre, torch.randn(5, 4), 3)
    loss.backward()
    assert loss.item() == 0
    assert pre.grad is not None
    assert torch.equal(pre.grad, torch.zeros_like(pre))


def naive_ghost(residual: Tensor, pre: Tensor, W_dec: Tensor) -> Tensor:
    """The sum before its rescaling, with the scale of each row as a constant."""
    rows = []
    for e, v in zip(residual, pre, strict=True):
        ghost = sum(v[j].exp() * W_dec[j] for j in range(len(W_dec)))
        scale = (e.norm() / (2 * ghost.norm())).detach()  # type: ignore[union-attr]
        rows.append((e - scale * ghost).square().sum())
    return torch.stack(rows).mean()


def test_ghost_gradients_are_those_of_a_rebuilt_residual_in_the_size_of_the_error() -> None:
    residual = torch.randn(6, 4, dtype=torch.float64)
    pre = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss, naive = ghost_gradients(residual, pre, W_dec), naive_ghost(residual, pre, W_dec)
    error = residual.square().sum(1).mean()
    torch.testing.assert_close(loss, error)
    found, expected = (torch.autograd.grad(value, (pre, W_dec)) for value in (loss, naive))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other * (error / naive).detach())


@pytest.mark.parametrize("size", [-1e4, -100.0, 100.0, 1e4])
def test_ghost_gradients_stay_finite_whatever_the_pre_activations(size: float) -> None:
    residual, W_dec = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True)
    pre = (size + torch.randn(6, 5)).requires_grad_()
    moved = ghost_gradients(residual, pre, W_dec)
    torch.testing.assert_close(moved, residual.square().sum(1).mean())
    moved.backward()
    assert pre.grad is not None
    assert pre.grad.isfinite().all()
    assert pre.grad.abs().max() > 1e-3
    # The size cancels: only differences of pre-activations count.
    centred = (pre.detach() - size).requires_grad_()
    ghost_gradients(residual, centred, W_dec.detach()).backward()
    torch.testing.assert_close(pre.grad, centred.grad, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nothing", ["residual", "W_dec"])
def test_losses_are_finite_where_there_is_nothing_to_rebuild_or_to_rebuild_with(
    nothing: str, loss: Callable[..., Tensor]
) -> None:
    given = {"residual": torch.randn(6, 4), "W_dec": torch.randn(5, 4)}
    given[nothing].zero_()
    pre = torch.randn(6, 5, requires_grad=True)
    found = loss(given["residual"], pre, given["W_dec"])
    found.backward()
    assert found.isfinite()
    assert pre.grad is not None
    assert pre.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_along_the_gradient_rebuilds_more(loss: Callable[..., Tensor]) -> None:
    residual = torch.randn(20, 4)
    weights = [torch.randn(20, 3) - 1, torch.randn(3, 4)]

    def left() -> float:
        ghost = weights[0].exp() @ weights[1]
        best = (residual * ghost).sum() / ghost.square().sum()
        return (residual - best * ghost).square().sum().item()

    before = left() if loss is ghost_gradients else loss(residual, *weights).item()
    for _ in range(20):
        given = [w.clone().requires_grad_() for w in weights]
        for w, g in zip(weights, torch.autograd.grad(loss(residual, *given), given), strict=True):
            w -= 0.2 * g
    after = left() if loss is ghost_gradients else loss(residual, *weights).item()
    assert after < 0.9 * before
