"""The ablations of the gated SAE: equalities, and what the step function is there for."""

import pytest
import torch

from lightning_sae import GatedSAE, ReLUSAE
from lightning_sae.architectures import RescaleAndShiftSAE
from lightning_sae.callbacks import DecoderNormProjection

X = torch.randn(40, 5, dtype=torch.float64)


def with_state_of(sae, other):
    sae.load_state_dict(other.state_dict(), strict=False)
    return sae.double()


def test_untouched_it_encodes_as_a_relu_sae(randomised):
    relu = randomised(ReLUSAE(5, 24))
    sae = with_state_of(RescaleAndShiftSAE(5, 24), relu)
    torch.testing.assert_close(sae.encode(X), relu.encode(X))


@torch.no_grad()
def test_scale_and_shift_reach_active_latents_alone(randomised):
    sae = randomised(RescaleAndShiftSAE(5, 24))
    pre = (X - sae.b_dec) @ sae.W_enc + sae.b_enc
    for row, found in zip(pre, sae.encode(X), strict=True):
        for j, value in enumerate(row):
            expected = sae.r_mag[j].exp() * value + sae.b_mag[j] if value > 0 else 0.0
            assert found[j].item() == pytest.approx(float(expected))


@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_is_the_three_terms_of_the_gated_sae(dense, randomised, evaluate):
    sae = randomised(RescaleAndShiftSAE(5, 24, l1_coefficient=0.3))
    found = evaluate(sae, X, dense)
    gate = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    frozen = gate @ sae.W_dec + sae.b_dec
    assert found.losses == pytest.approx(
        {
            "squared_error": (sae(X) - X).square().sum(-1).mean().item(),
            "l1": 0.3 * gate.sum(-1).mean().item(),
            "auxiliary": (frozen - X).square().sum(-1).mean().item(),
        }
    )


@pytest.mark.parametrize("dense", [True, False])
def test_with_magnitudes_that_know_the_gates_bias_it_is_the_gated_sae(
    dense, randomised, evaluate, assert_same
):
    """exp(r) pi + s is exp(r) (pi - b_enc) + b_mag for b_mag = s + exp(r) b_enc, if above 0."""
    sae = randomised(RescaleAndShiftSAE(5, 24))
    with torch.no_grad():
        sae.b_mag.abs_()
    gated = with_state_of(GatedSAE(5, 24), sae)
    with torch.no_grad():
        gated.b_mag.add_(sae.r_mag.exp() * sae.b_enc)
    found, expected = evaluate(sae, X, dense), evaluate(gated, X, dense)
    for each in (found, expected):  # of biases and scales gradients differ: they mean other things
        for name in ("b_enc", "r_mag"):
            del each.gradients[name]
    assert_same(found, expected)


def test_without_the_shift_a_latent_is_scaled_alone(fit):
    sae = RescaleAndShiftSAE(5, 24, l1_coefficient=0.1, use_b_mag=False, lr=0.01)
    fit(sae, torch.randn(10, 16, 5) + 1, DecoderNormProjection())
    assert not sae.b_mag.any()
    assert sae.r_mag.any()


@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_the_scale_undoes_shrinkage(fit):
    """One binary feature of strength 2: a ReLU SAE learns 2 - lambda/2 (see `test_relu`)."""
    x = 2.0 * (torch.rand(200, 64, 1) < 0.4) * torch.tensor([0.6, 0.8])
    schedule = {"lr": 0.05, "lr_decay_steps": 80}
    sae = RescaleAndShiftSAE(2, 1, l1_coefficient=1.0, b_dec_init="zero", **schedule)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[0.6, 0.8]]))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.requires_grad_(False)
    fit(sae, x, DecoderNormProjection())
    strength = sae.encode(torch.tensor([1.2, 1.6]))
    assert strength.item() == pytest.approx(2.0, rel=0.02)
