import pytest
import torch

from lightning_sae import ReLUSAE, TiedSAE
from lightning_sae.callbacks import DeadFeatureResampling, DecoderNormProjection
from lightning_sae.functional.penalties import Sqrt

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive_loss(sae, x):
    """The objective one example, one latent at a time."""
    b_dec, W, total = sae.b_dec.tolist(), sae.W_dec.tolist(), 0.0
    threshold = [0.0] * sae.d_sae if sae.threshold is None else sae.threshold.tolist()
    for row in x.tolist():
        seen = [a - b * sae.apply_b_dec_to_input for a, b in zip(row, b_dec, strict=True)]
        x_hat = b_dec
        for w, theta in zip(W, threshold, strict=True):
            pre = sum(a * b for a, b in zip(seen, w, strict=True))
            f = pre if pre > max(theta, 0.0) else 0.0
            x_hat = [a + f * b for a, b in zip(x_hat, w, strict=True)]
            norm = sum(a * a for a in w) ** 0.5 if sae.decoder_norm == "free" else 1.0
            total += sae.l1_coefficient * sae.penalty(torch.tensor(f * norm)).item()
        total += sum((a - b) ** 2 for a, b in zip(x_hat, row, strict=True))
    return total / len(x)


@pytest.fixture
def sae(randomised):
    return randomised(TiedSAE(4, 9, 0.7, decoder_norm="free")).double()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"decoder_norm": "free"},
        {"apply_b_dec_to_input": False},
        {"penalty": Sqrt()},
        {"threshold_init": 0.5},
    ],
    ids=str,
)
def test_objective_is_squared_error_plus_penalty(arguments, dense, evaluate, randomised):
    sae = randomised(TiedSAE(4, 9, 0.7, **arguments))
    sae.b_enc.zero_()
    found = evaluate(sae, X, dense)
    assert found.loss == pytest.approx(naive_loss(sae, X), rel=1e-6)
    assert 0 < found.f.count_nonzero() < found.f.numel()


@pytest.mark.parametrize("arguments", [{}, {"threshold_init": 0.5}], ids=str)
def test_both_layouts_have_the_same_gradients(arguments, randomised, evaluate, assert_same):
    sae = randomised(TiedSAE(4, 9, 0.7, **arguments))
    assert_same(evaluate(sae, X, dense=True), evaluate(sae, X, dense=False))


@pytest.mark.parametrize("dense", [True, False])
def test_it_is_an_untied_sae_whose_encoder_is_the_transpose(sae, dense, evaluate):
    """And its one matrix has the gradients of both."""
    sae.b_enc.zero_()
    untied = ReLUSAE(4, 9, 0.7, decoder_norm="free").double()
    with torch.no_grad():
        untied.W_enc.copy_(sae.W_dec.T)
        untied.W_dec.copy_(sae.W_dec)
        untied.b_dec.copy_(sae.b_dec)
    found, expected = evaluate(sae, X, dense), evaluate(untied, X, dense)
    assert found.losses == pytest.approx(expected.losses)
    torch.testing.assert_close(found.f, expected.f)
    both = expected.gradients["W_enc"].T + expected.gradients["W_dec"]
    torch.testing.assert_close(found.gradients["W_dec"], both)
    torch.testing.assert_close(found.gradients["b_dec"], expected.gradients["b_dec"])


def test_training_moves_one_matrix_and_no_encoder_bias(fit):
    sae = TiedSAE(4, 9, lr=0.01)
    before = sae.W_enc.detach().clone()
    fit(sae, torch.randn(4, 16, 4), DecoderNormProjection())
    assert set(dict(sae.named_parameters())) == {"W_dec", "b_dec"}
    assert sae.W_enc.data_ptr() == sae.W_dec.data_ptr()
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not torch.equal(sae.W_enc, before)
    assert torch.equal(sae.b_enc, torch.zeros(9))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(9))


def test_with_thresholds_below_zero_it_is_the_one_without(randomised, evaluate):
    jumping = randomised(TiedSAE(4, 9, 0.7, threshold_init=0.5))
    with torch.no_grad():
        jumping.threshold.sub_(10)
    plain = TiedSAE(4, 9, 0.7).double()
    plain.load_state_dict({k: v for k, v in jumping.state_dict().items() if k != "threshold"})
    found, expected = evaluate(jumping, X), evaluate(plain, X)
    assert found.losses == pytest.approx(expected.losses)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
    torch.testing.assert_close(jumping.encode(X), plain.encode(X))


@pytest.mark.parametrize("arguments", [{}, {"threshold_init": 0.5}], ids=str)
@pytest.mark.parametrize("scheme", ["loss_squared", "reinitialize"])
def test_a_dead_latent_is_resampled_in_its_one_row(scheme, arguments, fit):
    sae = TiedSAE(4, 3, lr=1e-30, b_dec_init="zero", **arguments)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4)[[0, 1, 3]])
        if arguments:
            sae.threshold.copy_(torch.tensor([0.1, 0.2, 3.0]))
    x = torch.rand(3, 16, 4) + 0.2
    x[..., 3] = -1  # on which latent 2 reads nothing positive
    trainer = fit(sae, x, DeadFeatureResampling(2, scheme), DecoderNormProjection())
    torch.testing.assert_close(sae.W_dec[:2], torch.eye(4)[:2])
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(3))
    assert (sae.W_dec[2] - torch.eye(4)[3]).norm() > 0.1
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    moments = trainer.optimizers[0].state[sae.W_dec]["exp_avg_sq"]
    assert (moments[:2].sum(-1) > 0).all()
    if arguments:
        torch.testing.assert_close(sae.threshold.detach(), torch.tensor([0.1, 0.2, 0.5]))
    if scheme == "loss_squared":
        seen = torch.nn.functional.normalize(x[:2].flatten(0, 1), dim=-1)
        assert (sae.W_dec[2] - seen).abs().amax(-1).min() < 1e-6


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`threshold_init` to be at least 0 but got -1"):
        TiedSAE(4, 9, threshold_init=-1.0)
    with pytest.raises(ValueError, match="`bandwidth` to be positive but got 0"):
        TiedSAE(4, 9, bandwidth=0.0)
