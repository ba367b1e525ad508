import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sae import ReLUSAE, TiedSAE
from lightning_sae.functional import orthogonality as module
from lightning_sae.functional.orthogonality import Side, orthogonality
from lightning_sae.functional.sparse.code import Code, Layout, encode
from lightning_sae.functional.sparse.selection import Above

BATCH, D_IN, D_SAE = 9, 4, 13
SIDES: tuple[Side, ...] = ("low", "high")


def always(dense: bool) -> Layout:
    """A layout that stays as it is, whatever it sees."""
    return Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))


def by_double_loop(x: Tensor, W_enc: Tensor, f: Tensor, tau: Tensor, side: Side) -> Tensor:
    """One pair at a time, as the formula says it."""
    total = x.new_zeros(())
    for i in range(len(x)):
        for j in range(W_enc.shape[1]):
            if (f[i, j] > tau[j]) == (side == "high"):
                cosine = x[i] @ W_enc[:, j] / (x[i].norm() * W_enc[:, j].norm())
                total = total + cosine**2
    return total / (len(x) * W_enc.shape[1])


class Problem:
    """Weights, inputs, and thresholds in the midst of the activations."""

    def __init__(self, d_in: int = D_IN, d_sae: int = D_SAE, batch: int = BATCH) -> None:
        wide: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
        self.x = torch.randn(batch, d_in, **wide)
        self.W_enc = torch.randn(d_in, d_sae, **wide)
        self.b_enc = torch.randn(d_sae, **wide)
        self.b_dec = torch.randn(d_in, **wide)
        self.tau = torch.linspace(0, 2, d_sae, dtype=torch.float64)
        self.tensors = (self.x, self.W_enc, self.b_enc, self.b_dec)

    @property
    def f(self) -> Tensor:
        return torch.relu((self.x - self.b_dec) @ self.W_enc + self.b_enc)

    def expected(self, side: Side) -> Tensor:
        return by_double_loop(self.x - self.b_dec, self.W_enc, self.f, self.tau, side)

    def loss(self, side: Side, dense: bool) -> Tensor:
        f = encode(self.x, self.W_enc, self.b_enc, Above(0.0), always(dense), 4, origin=self.b_dec)
        products = f.with_values(f.values - f.at(self.b_enc))
        strong = f.values.detach() > f.at(self.tau)
        return orthogonality(self.x - self.b_dec, self.W_enc, products, strong, side)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(loss, self.tensors, allow_unused=True, materialize_grads=True)
        return tuple(found)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("d_in", [2, 40])  # two Gram matrices are cheaper, and the whole one is
def test_value_and_gradients_are_those_of_the_double_loop(
    d_in: int, dense: bool, side: Side
) -> None:
    p = Problem(d_in)
    expected, found = p.expected(side), p.loss(side, dense)
    torch.testing.assert_close(found, expected)
    strong = p.f > p.tau
    assert 0 < strong.sum() < (p.f > 0).sum() < p.f.numel()  # there is each kind of pair
    torch.testing.assert_close(p.gradients(found), p.gradients(expected))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dense", [True, False])
def test_gradients_are_those_of_finite_differences(dense: bool, side: Side) -> None:
    p = Problem(2)

    def loss(*tensors: Tensor) -> Tensor:
        p.x, p.W_enc, p.b_enc, p.b_dec = tensors
        return p.loss(side, dense)

    assert torch.autograd.gradcheck(loss, p.tensors)


def test_the_two_ways_for_a_matrix_are_both_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    gram = module._of_all

    def noted(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        taken.append(x.shape[1])
        return gram(x, W)

    monkeypatch.setattr(module, "_of_all", noted)
    for d_in in (2, 40):
        Problem(d_in).loss("low", dense=True)
        Problem(d_in).loss("low", dense=False)
    assert taken == [2, 2, 40]  # a matrix of all pairs is never made for a list of the active ones


def test_both_sides_together_are_all_pairs_and_orthogonal_bases_are_known() -> None:
    """The squared cosines of a vector with an orthonormal basis add up to 1."""
    p = Problem(d_sae=D_IN)
    with torch.no_grad():
        p.W_enc.copy_(torch.linalg.qr(p.W_enc).Q * 3)
    both = p.loss("low", dense=False) + p.loss("high", dense=False)
    assert both.item() == pytest.approx(1 / D_IN, abs=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_inputs_and_directions_without_length_are_orthogonal_to_everything(dense: bool) -> None:
    p = Problem(2)
    with torch.no_grad():
        p.x[3] = p.b_dec
        p.W_enc[:, 5] = 0
        p.b_enc[5] = 4.0  # fires above its threshold all the same
    for side in SIDES:
        loss = p.loss(side, dense)
        assert all(gradient.isfinite().all() for gradient in p.gradients(loss))
        rows, latents = torch.arange(BATCH) != 3, torch.arange(D_SAE) != 5
        f = p.f[rows][:, latents]
        seen, W_enc = (p.x - p.b_dec)[rows], p.W_enc[:, latents]
        rest = by_double_loop(seen, W_enc, f, p.tau[latents], side)
        torch.testing.assert_close(loss * BATCH * D_SAE, rest * (BATCH - 1) * (D_SAE - 1))


def test_it_is_taken_in_full_precision_under_autocast() -> None:
    x, W_enc = torch.randn(64, 8), torch.randn(8, 100)
    f = (x @ W_enc).relu()
    products, strong = Code.of_matrix(x @ W_enc), f > 1
    expected = orthogonality(x, W_enc, products, strong)
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonality(x, W_enc, products, strong)
    assert torch.equal(found, expected)


def losses_by_hand(sae: ReLUSAE, x: Tensor) -> Tensor:
    """The auxiliary loss of an SAE, from its public methods and the double loop."""
    assert sae.peaks is not None
    tau = sae.orthogonality_scale * sae.peaks.thresholds()
    f, seen = sae.encode(x), sae.encoder_input(x)
    cost = by_double_loop(seen, sae.W_enc, f, tau, sae.orthogonality_side)
    return sae.orthogonality_coefficient * sae.orthogonality_scale * cost


class Doubling(ReLUSAE):
    """Latents that are not their pre-activations."""

    def activate(self, pre: Tensor) -> Tensor:
        return 2 * pre.relu()


def jumping(d_in: int, d_sae: int, **kwargs: Any) -> TiedSAE:
    return TiedSAE(d_in, d_sae, threshold_init=0.3, bandwidth=0.4, **kwargs)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [ReLUSAE, TiedSAE, jumping, Doubling])
def test_an_sae_has_the_loss_of_its_own_directions(kind: Any, side: Side, dense: bool) -> None:
    sae = kind(3, 11, orthogonality_coefficient=7.0, orthogonality_side=side).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.peaks.recent[4] = torch.rand(11) * 3
    sae.orthogonality_scale, sae.layout = 0.8, always(dense)
    x = torch.randn(8, 3, dtype=torch.float64)
    found, expected = sae.objective(x).losses["orthogonality"], losses_by_hand(sae, x)
    torch.testing.assert_close(found, expected)
    weights = list(sae.parameters())
    for one, other in zip(
        torch.autograd.grad(found, weights, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, weights, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_scale_of_zero_has_no_loss_and_no_coefficient_has_no_term() -> None:
    sae = ReLUSAE(3, 5, orthogonality_coefficient=7.0)
    sae.orthogonality_scale = 0.0
    assert sae.objective(torch.randn(4, 3)).losses["orthogonality"].item() == 0
    plain = ReLUSAE(3, 5)
    assert "orthogonality" not in plain.objective(torch.randn(4, 3)).losses
    assert not [name for name in plain.state_dict() if "peaks" in name]


def test_the_mean_of_squared_cosines_at_random_is_one_in_so_many_dimensions() -> None:
    x, W_enc = torch.randn(4000, 5), torch.randn(5, 30)
    nothing = torch.zeros(4000, 30, dtype=torch.bool)
    loss = orthogonality(x, W_enc, Code.of_matrix(x @ W_enc), nothing)
    assert math.isclose(loss.item(), 1 / 5, rel_tol=0.02)
