import math
import warnings

import pytest
import torch
from torch import Tensor

from lightning_sae import GatedSAE, ReLUSAE
from lightning_sae.callbacks import DeadFeatureResampling, DecoderNormProjection
from lightning_sae.functional.penalties import Sqrt

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive_losses(sae, x):
    """The paper's three terms, one example, one latent at a time."""
    W_enc, W_dec, b_dec = sae.W_enc.T.tolist(), sae.W_dec.tolist(), sae.b_dec.tolist()
    r_mag, b_mag, b_gate = sae.r_mag.tolist(), sae.b_mag.tolist(), sae.b_enc.tolist()
    terms = {"squared_error": 0.0, "l1": 0.0, "auxiliary": 0.0}
    for row in x.tolist():
        seen = [a - b * sae.apply_b_dec_to_input for a, b in zip(row, b_dec, strict=True)]
        x_hat, by_gate = list(b_dec), list(b_dec)
        for j in range(sae.d_sae):
            product = sum(a * b for a, b in zip(seen, W_enc[j], strict=True))
            pi = product + b_gate[j]
            if pi <= 0:
                continue
            magnitude = max(0.0, math.exp(r_mag[j]) * product + b_mag[j])
            x_hat = [a + magnitude * w for a, w in zip(x_hat, W_dec[j], strict=True)]
            by_gate = [a + pi * w for a, w in zip(by_gate, W_dec[j], strict=True)]
            norm = math.hypot(*W_dec[j]) if sae.decoder_norm == "free" else 1.0
            terms["l1"] += sae.penalty(torch.tensor(pi * norm)).item()
        terms["squared_error"] += sum((a - b) ** 2 for a, b in zip(row, x_hat, strict=True))
        terms["auxiliary"] += sum((a - b) ** 2 for a, b in zip(row, by_gate, strict=True))
    weights = {"l1": sae.l1_coefficient, "auxiliary": sae.auxiliary_coefficient}
    return {name: value * weights.get(name, 1.0) / len(x) for name, value in terms.items()}


ARGUMENTS = [
    {},
    {"decoder_norm": "free"},
    {"decoder_norm": "free", "auxiliary_decoder": "live"},
    {"apply_b_dec_to_input": False, "auxiliary_coefficient": 0.3},
    {"penalty": Sqrt()},
]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_objective_is_the_three_terms_of_the_paper(arguments, dense, randomised, evaluate):
    sae = randomised(GatedSAE(4, 9, 0.7, **arguments))
    found = evaluate(sae, X, dense)
    assert found.losses == pytest.approx(naive_losses(sae, X), rel=1e-6)
    assert 0 < found.f.count_nonzero() < found.f.numel()
    torch.testing.assert_close(found.f, sae.encode(X))
    torch.testing.assert_close(found.x_hat, sae(X))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_both_layouts_have_the_same_gradients(arguments, randomised, evaluate, assert_same):
    sae = randomised(GatedSAE(4, 9, 0.7, **arguments))
    assert_same(evaluate(sae, X, dense=True), evaluate(sae, X, dense=False))


def paper_loss(sae, x) -> Tensor:
    """Appendix G of the paper: two linear maps with tied weights, and a decoder cut off."""
    W_gate, b_gate = sae.W_enc, sae.b_enc
    W_mag = sae.r_mag.exp() * W_gate
    pi = (x - sae.b_dec) @ W_gate + b_gate
    gates = (pi > 0).double()
    magnitudes = ((x - sae.b_dec) @ W_mag + sae.b_mag).relu()
    reconstruction = (gates * magnitudes) @ sae.W_dec + sae.b_dec
    by_gate = pi.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    return (
        (x - reconstruction).square().sum(-1).mean()
        + sae.l1_coefficient * pi.relu().sum(-1).mean()
        + (x - by_gate).square().sum(-1).mean()
    )


@pytest.mark.parametrize("dense", [True, False])
def test_gradients_are_those_of_the_papers_pseudocode(dense, randomised, evaluate):
    sae = randomised(GatedSAE(4, 9, 0.7))
    names, weights = zip(*sae.named_parameters(), strict=True)
    expected = torch.autograd.grad(paper_loss(sae, X), weights)
    found = evaluate(sae, X, dense)
    assert found.loss == pytest.approx(paper_loss(sae, X).item())
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found.gradients[name], gradient)


def test_with_equal_biases_and_no_rescaling_latents_are_those_of_a_relu(randomised):
    gated = randomised(GatedSAE(4, 9))
    with torch.no_grad():
        gated.r_mag.zero_()
        gated.b_mag.copy_(gated.b_enc)
    plain = ReLUSAE(4, 9).double()
    plain.load_state_dict({k: gated.state_dict()[k] for k in plain.state_dict()})
    torch.testing.assert_close(gated.encode(X), plain.encode(X))
    torch.testing.assert_close(gated(X), plain(X))


def test_who_is_trained_by_which_term(randomised, evaluate):
    """The penalty and the last term reach the gate alone, the squared error all but its bias."""
    sae = randomised(GatedSAE(4, 9, apply_b_dec_to_input=False))
    reached = {}
    for term in ("squared_error", "l1", "auxiliary"):
        gradients = evaluate(sae, X, term=term).gradients
        reached[term] = {name for name, g in gradients.items() if g.abs().max() > 1e-9}
    assert reached["squared_error"] == {"W_enc", "W_dec", "b_dec", "r_mag", "b_mag"}
    assert reached["l1"] == reached["auxiliary"] == {"W_enc", "b_enc"}


def test_a_live_auxiliary_decoder_is_trained_by_the_last_term(randomised, evaluate):
    sae = randomised(GatedSAE(4, 9, auxiliary_decoder="live"))
    found = evaluate(sae, X, term="auxiliary").gradients
    pi = sae.pre_activations(X).relu()
    error = pi @ sae.W_dec + sae.b_dec - X
    torch.testing.assert_close(found["W_dec"], 2 * (pi.T @ error / len(X)).detach())


@pytest.mark.parametrize("norms", ["frozen", "live"])
def test_norms_in_the_penalty_are_trained_if_live(norms, randomised, evaluate):
    arguments = {"auxiliary_decoder": norms, "norms_in_penalty": norms}
    sae = randomised(GatedSAE(4, 9, 0.7, decoder_norm="free", **arguments))
    found = evaluate(sae, X, term="l1").gradients["W_dec"]
    pulls = 0.7 * sae.pre_activations(X).relu().mean(0)
    along = (pulls / sae.W_dec.norm(dim=-1)).unsqueeze(-1) * sae.W_dec
    expected = along if norms == "live" else torch.zeros_like(along)
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize(("auxiliary", "norms"), [("frozen", "live"), ("live", "frozen")])
def test_one_frozen_and_the_other_live_is_warned_of(auxiliary, norms):
    arguments = {"auxiliary_decoder": auxiliary, "norms_in_penalty": norms}
    with pytest.warns(UserWarning, match=f"is {auxiliary} but `norms_in_penalty` is {norms}"):
        GatedSAE(4, 9, decoder_norm="free", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GatedSAE(4, 9, decoder_norm="unit", **arguments)  # there are no norms in the penalty
        GatedSAE(4, 9, decoder_norm="free", auxiliary_decoder=auxiliary)  # norms are the same


def test_magnitudes_may_do_without_a_bias(fit):
    sae = GatedSAE(4, 9, 0.1, lr=0.01, use_b_mag=False)
    fit(sae, torch.randn(4, 32, 4), DecoderNormProjection())
    assert torch.equal(sae.b_mag, torch.zeros(9))
    assert sae.r_mag.abs().max() > 0.01
    with_bias = GatedSAE(4, 9, 0.1, lr=0.01)
    fit(with_bias, torch.randn(4, 32, 4), DecoderNormProjection())
    assert with_bias.b_mag.abs().max() > 0.01


def share_open(fit, auxiliary_coefficient: float) -> float:
    """How often gates are open after training on four features, each firing on its own."""
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(100, 64, 4, generator=generator) < 0.3
    x = fires * (1 + torch.rand(100, 64, 4, generator=generator))
    torch.manual_seed(3)
    sae = GatedSAE(
        4,
        8,
        0.2,
        lr=0.05,
        b_dec_init="zero",
        auxiliary_coefficient=auxiliary_coefficient,
    )
    fit(sae, x, DecoderNormProjection())
    return (sae.pre_activations(x[-1]) > 0).double().mean().item()


@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_without_the_last_term_the_gate_shuts_and_with_it_it_does_not(fit):
    assert share_open(fit, auxiliary_coefficient=0.0) < 0.01
    assert share_open(fit, auxiliary_coefficient=1.0) > 0.1


def test_a_resampled_latent_has_the_magnitude_of_its_gate(fit):
    """Or one that died of its magnitude would stay dead whatever its direction."""
    sae = GatedSAE(4, 3, lr=1e-30, b_dec_init="zero")
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4)[:3])
        sae.W_enc.copy_(torch.eye(4)[:, :3])
        sae.r_mag.fill_(0.5)
        sae.b_mag.copy_(torch.tensor([0.1, 0.2, -100.0]))
    x = torch.rand(3, 16, 4) + 0.2
    trainer = fit(sae, x, DeadFeatureResampling(2), DecoderNormProjection())
    torch.testing.assert_close(sae.b_mag.detach(), torch.tensor([0.1, 0.2, 0.0]))
    torch.testing.assert_close(sae.r_mag.detach(), torch.tensor([0.5, 0.5, 0.0]))
    assert (sae.encode(x)[..., 2] > 0).any()
    assert sae.W_enc.norm(dim=0)[2].item() == pytest.approx(0.2)
    state = trainer.optimizers[0].state
    assert (state[sae.r_mag]["exp_avg_sq"][:2] > 0).all()


def test_arguments_out_of_range_are_refused(unchecked):
    with pytest.raises(ValueError, match="`auxiliary_coefficient` to be at least 0 but got -1"):
        GatedSAE(4, 9, auxiliary_coefficient=-1.0)
    with pytest.raises(ValueError, match="`auxiliary_decoder` to be one of .* but got 'off'"):
        GatedSAE(4, 9, auxiliary_decoder="off")
    with pytest.raises(ValueError, match="`norms_in_penalty` to be one of .* but got 'off'"):
        GatedSAE(4, 9, norms_in_penalty="off")
