"""A trained SAE with scales: which latents fire, what trains, what is saved."""

import copy

import pytest
import torch
from torch import Tensor

import lightning_sae
from lightning_sae import GatedSAE, ReLUSAE, RescaledSAE, TiedSAE, ToyDataModule
from lightning_sae.architectures.rescaled import TRAINED
from lightning_sae.callbacks import DeadFeatureResampling, DecoderNormProjection, RunCheckpoint
from lightning_sae.functional.sparse.code import Layout

FROZEN_ENCODER = ("scale", "decoder", "unrotated_decoder")
D_IN, D_SAE = 5, 24


def trained_sae(apply_b_dec_to_input=True, kind=ReLUSAE, **arguments):
    """Random weights, about a quarter of latents on, as a trained SAE has them."""
    sae = kind(D_IN, D_SAE, 0.3, apply_b_dec_to_input=apply_b_dec_to_input, **arguments)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if kind is ReLUSAE:
            sae.b_enc.sub_(1.0)
    sae.source, sae.is_trained = {"hook_name": "somewhere"}, True
    return sae


def batches(steps=12, seed=0) -> Tensor:
    return torch.randn(steps, 32, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.3


X = batches(1, seed=9)[0]


@pytest.mark.parametrize("kind", [ReLUSAE, TiedSAE])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("method", TRAINED)
def test_with_scales_of_one_it_is_the_trained_sae_bit_for_bit(method, apply_b_dec_to_input, kind):
    sae = trained_sae(apply_b_dec_to_input, kind)
    copied = RescaledSAE.of(sae, method)
    assert torch.equal(copied.encode(X), sae.encode(X))
    assert torch.equal(copied(X), sae(X))
    with torch.no_grad():
        copied.W_dec.zero_()
    assert sae.W_dec.any()  # of the copy, not of the original


@pytest.mark.parametrize("dense", [True, False])
@torch.no_grad()
def test_latents_and_loss_are_those_of_the_formula(dense, evaluate):
    sae = RescaledSAE.of(trained_sae().double(), "encoder")
    sae.scale.normal_(1.0, 0.3)
    sae.b_dec.normal_()  # which the encoder does not see
    x = X.double()
    f = torch.zeros(len(x), D_SAE, dtype=torch.float64)
    for i, row in enumerate(x):
        for j in range(D_SAE):
            pre = float((row - sae.origin) @ sae.W_enc[:, j] + sae.b_enc[j])
            f[i, j] = float(sae.scale[j]) * max(pre, 0.0)
    torch.testing.assert_close(sae.encode(x), f)
    error = (f @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean().item()
    with torch.enable_grad():
        assert evaluate(sae, x, dense).losses == pytest.approx({"squared_error": error})


@pytest.mark.parametrize("method", TRAINED)
def test_gradients_of_both_layouts_are_those_of_a_plain_loop(method, evaluate):
    sae = RescaledSAE.of(trained_sae().double(), method)
    with torch.no_grad():
        sae.scale.normal_(1.0, 0.3)
    x, found = X.double(), [evaluate(sae, X.double(), dense) for dense in (True, False)]
    f = sae.scale * ((x - sae.origin) @ sae.W_enc + sae.b_enc).relu()
    loss = (f @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean()
    weights = {n: w for n, w in sae.named_parameters() if w.requires_grad}
    assert set(weights) == set(TRAINED[method])
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for each in found:
        torch.testing.assert_close(each.gradients, expected)


@pytest.mark.parametrize("method", TRAINED)
def test_only_what_the_method_says_is_trained(method, fit):
    sae = RescaledSAE.of(trained_sae(), method, lr=0.02)
    before = copy.deepcopy(sae.state_dict())
    fit(sae, batches())
    moved = {n for n, w in sae.state_dict().items() if not torch.equal(w, before[n])}
    assert moved - {"silent_for"} == set(TRAINED[method])


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("method", FROZEN_ENCODER)
def test_with_the_encoder_frozen_the_same_latents_fire_on_every_token(
    method, dense, apply_b_dec_to_input, fit
):
    original = trained_sae(apply_b_dec_to_input)
    sae = RescaledSAE.of(original, method, lr=0.02)
    sae.layout = Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))
    fit(sae, batches())
    fires = original.encode(X) > 0
    assert 0.05 < fires.float().mean() < 0.6
    assert torch.equal(sae.encode(X) != 0, fires)
    assert (sae.scale != 1).all()


@pytest.mark.parametrize("method", ["encoder", "unrotated_encoder", "unrotated_all"])
def test_with_the_encoder_trained_other_latents_fire(method, fit):
    original = trained_sae()
    sae = RescaledSAE.of(original, method, lr=0.02)
    fit(sae, batches())
    assert not torch.equal(sae.encode(X) != 0, original.encode(X) > 0)


@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_the_scale_of_a_suppressed_feature_undoes_the_penalty(fit):
    """A feature of strength 2 learnt as 2 - lambda/2 = 1.5 is scaled by 2/1.5."""
    direction = torch.tensor([[0.6, 0.8]])
    suppressed = ReLUSAE(2, 1, 1.0, apply_b_dec_to_input=False)
    with torch.no_grad():
        suppressed.W_dec.copy_(direction)
        suppressed.W_enc.copy_(direction.T)
        suppressed.b_enc.fill_(-0.5)
    suppressed.is_trained = True
    x = 2.0 * (torch.rand(150, 64, 1) < 0.4) * direction
    sae = RescaledSAE.of(suppressed, "scale", lr=0.01)
    fit(sae, x)
    assert sae.scale.item() == pytest.approx(2 / 1.5, rel=1e-3)


def test_unit_decoder_rows_turn_only(fit):
    sae = RescaledSAE.of(trained_sae(), "decoder", decoder_norm="unit", lr=0.02)
    fit(sae, batches(), DecoderNormProjection())
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))


# Folding the scales.


def fine_tuned(fit, method="decoder", apply_b_dec_to_input=True, **arguments):
    sae = RescaledSAE.of(trained_sae(apply_b_dec_to_input), method, lr=0.02, **arguments)
    fit(sae, batches())
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("method", TRAINED)
def test_the_scale_folds_into_the_decoder(method, apply_b_dec_to_input, fit, tmp_path):
    sae = fine_tuned(fit, method, apply_b_dec_to_input).double()
    plain = sae.folded()
    assert type(plain) is ReLUSAE
    x = X.double()
    torch.testing.assert_close(plain(x), sae(x))
    torch.testing.assert_close(plain.encode(x) * sae.scale, sae.encode(x))
    torch.testing.assert_close(plain.W_dec, sae.scale.diag() @ sae.W_dec)
    loaded = lightning_sae.load(plain.float().save_pretrained(tmp_path / "plain"))
    assert type(loaded) is ReLUSAE
    assert loaded.source == {"hook_name": "somewhere"}
    torch.testing.assert_close(loaded(X), sae.float()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_folded_into_the_encoder_latents_keep_their_strength(method, fit):
    sae = fine_tuned(fit, method).double()
    plain, x = sae.folded("encoder"), X.double()
    torch.testing.assert_close(plain.encode(x), sae.encode(x))
    torch.testing.assert_close(plain(x), sae(x))
    assert torch.equal(plain.W_dec, sae.W_dec)
    with torch.no_grad():
        sae.scale[3] = -0.1
    with pytest.raises(ValueError, match="1 of 24 are not.*fold into the decoder"):
        sae.folded("encoder")
    torch.testing.assert_close(sae.folded()(x), sae(x))


# Scaling of inputs, saving, going on.

MEAN, SCALE = torch.linspace(-1, 1, D_IN), torch.tensor(3.0)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("kind", [ReLUSAE, GatedSAE, RescaledSAE])
def test_folding_undoes_the_adoption_of_a_scaling(kind, apply_b_dec_to_input, tmp_path):
    raw = trained_sae(apply_b_dec_to_input, GatedSAE if kind is GatedSAE else ReLUSAE)
    raw = RescaledSAE.of(raw) if kind is RescaledSAE else raw
    sae, folded_once = copy.deepcopy(raw), tmp_path / "sae"
    sae.adopt_scaling(MEAN, SCALE)
    assert torch.equal(sae.input_scale, SCALE)
    assert not torch.allclose(sae.b_enc, raw.b_enc)
    torch.testing.assert_close(sae.encode(X), raw.encode(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(X), raw(X), rtol=1e-4, atol=1e-5)
    loaded = lightning_sae.load(sae.save_pretrained(folded_once))
    for name, weight in raw.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


def test_a_loaded_sae_is_trained_on_in_the_space_of_the_data(fit):
    """Adam's first step of a bias is the learning rate in that space: in raw units, over scale."""
    before = trained_sae()
    sae = RescaledSAE.of(before, "unrotated_encoder", lr=1e-3)
    world = ToyDataModule(8, D_IN, directions="random", center=True, scale=True, batch_size=32)
    fit(sae, world, max_steps=1, limit_val_batches=0)
    assert torch.equal(sae.input_mean, world.scaling().mean)
    assert torch.equal(sae.input_scale, world.scaling().scale)
    assert not torch.equal(sae.input_scale, torch.ones(()))
    raw_step = (sae.b_enc / sae.input_scale - before.b_enc).abs()
    assert raw_step.max().item() == pytest.approx(1e-3 / sae.input_scale.item(), rel=0.01)


@pytest.mark.parametrize("method", ["scale", "decoder", "encoder"])
def test_a_saved_sae_is_what_was_trained(method, fit, tmp_path):
    sae = RescaledSAE.of(trained_sae(), method, lr=0.02)
    sae.adopt_scaling(MEAN, SCALE)
    trainer = fit(sae, batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for path in (sae.save_pretrained(tmp_path / "sae"), tmp_path / "a.ckpt"):
        loaded = lightning_sae.load(path)
        assert type(loaded) is RescaledSAE
        assert loaded.method == method
        torch.testing.assert_close(loaded.encode(X), sae.encode(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(X), sae(X), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_one_that_was_not_stopped(fit, tmp_path):
    start = trained_sae()

    def run(epochs, **flags):
        sae = RescaledSAE.of(start, lr=0.02)
        sae.layout.thresholds = (0.95, 0.99)  # another layout from the second batch on
        return sae, fit(sae, batches(3), max_steps=-1, max_epochs=epochs, **flags)

    straight, _ = run(2)
    stopped, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = run(2, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    for name, expected in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name
    assert not torch.equal(stopped.W_dec, straight.W_dec)


def test_it_begins_with_a_folder_as_it_does_with_an_sae(fit, tmp_path):
    original = trained_sae()
    folder = original.save_pretrained(tmp_path / "before" / "sae")
    sae = RescaledSAE(D_IN, D_SAE, "scale", sae=folder)
    assert torch.equal(sae.encode(X), RescaledSAE.of(original).encode(X))
    assert "sae" not in sae.hparams  # or loading it would ask for the folder
    fit(sae, batches(), RunCheckpoint(5), default_root_dir=tmp_path, enable_checkpointing=True)
    assert lightning_sae.load(tmp_path / "checkpoints" / "last.ckpt").method == "scale"


# Bad input.


def test_what_cannot_be_fine_tuned_is_refused(fit, unchecked):
    with pytest.raises(ValueError, match="`method` to be one of .* but got 'baseline'"):
        RescaledSAE.of(trained_sae(), "baseline")
    with pytest.raises(ValueError, match="`revive` to be one of .* but got 'auxk'"):
        RescaledSAE.of(trained_sae(), revive="auxk")
    for other in (GatedSAE(4, 6), TiedSAE(4, 6, threshold_init=0.1)):
        with pytest.raises(ValueError, match="`sae` to have ReLU latents but got"):
            RescaledSAE.of(other)
    with pytest.raises(ValueError, match="start from a trained SAE.*RescaledSAE.of"):
        fit(RescaledSAE(D_IN, D_SAE), batches())
    with pytest.raises(ValueError, match="`DeadFeatureResampling` needs .* all trained"):
        fit(RescaledSAE.of(trained_sae(), "scale"), batches(), DeadFeatureResampling(2))


def test_a_folder_of_another_size_is_refused(tmp_path):
    folder = trained_sae().save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match="`d_in` and `d_sae` to be 5 and 24.*but got 5 and 25"):
        RescaledSAE(D_IN, D_SAE + 1, sae=folder)
