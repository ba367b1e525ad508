import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_sae import JumpReLUSAE, ReLUSAE
from lightning_sae.callbacks import DeadFeatureResampling, DecoderNormProjection
from lightning_sae.functional.penalties import L1, Log

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


@pytest.fixture
def build(randomised):
    """A random SAE whose thresholds are spread over positive numbers, the first one negative."""

    def build(**arguments):
        sae = randomised(JumpReLUSAE(4, 9, 0.7, **{"bandwidth": 0.8, **arguments}))
        with torch.no_grad():
            sae.threshold.copy_(torch.linspace(0.0, 1.2, 9))
            sae.threshold[0] = -0.5
        return sae

    return build


def pairs(sae, x):
    """Every row and latent with its pre-activation, threshold in force and gradient of `x_hat`."""
    v = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).tolist()
    theta = [max(0.0, t) for t in sae.threshold.tolist()]
    f = [[a if a > t else 0.0 for a, t in zip(row, theta, strict=True)] for row in v]
    x_hat = torch.tensor(f, dtype=x.dtype) @ sae.W_dec + sae.b_dec
    df = (2 * (x_hat - x) @ sae.W_dec.T / len(x)).tolist()
    error = (x_hat - x).square().sum().item() / len(x)
    entries = [(v[i][j], theta[j], df[i][j], j) for i in range(len(x)) for j in range(sae.d_sae)]
    return entries, error


def inside(sae, v: float, theta: float) -> bool:
    return abs(v - theta) / sae.bandwidth < 0.5


@pytest.mark.parametrize("dense", [True, False])
def test_objective_and_pseudo_derivatives_are_those_of_the_paper(dense, build, evaluate):
    sae = build()
    entries, error = pairs(sae, X)
    gradient, count = [0.0] * 9, 0
    for v, theta, df, j in entries:
        count += v > theta
        if inside(sae, v, theta):
            gradient[j] += -(theta / sae.bandwidth) * df - 0.7 / sae.bandwidth / len(X)
    found = evaluate(sae, X, dense)
    assert found.losses == pytest.approx({"squared_error": error, "sparsity": 0.7 * count / len(X)})
    torch.testing.assert_close(found.gradients["threshold"].tolist(), gradient)
    assert len([g for g in gradient if g]) > 3
    assert found.f.count_nonzero() == count
    torch.testing.assert_close(found.f, sae.encode(X))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("multiplier", [0.0, 0.4])
def test_the_distance_to_a_target_is_squared_and_pulls_on_thresholds(
    multiplier, dense, build, evaluate
):
    sae = build(target_l0=2.5)
    sae.multiplier.fill_(multiplier)
    entries, _ = pairs(sae, X)
    excess = sum(v > theta for v, theta, _, _ in entries) / len(X) / 2.5 - 1
    weight = 0.7 * (X - X.mean(0)).square().sum().item() / len(X)
    gradient = [0.0] * 9
    for v, theta, _, j in entries:
        if inside(sae, v, theta):
            slope = weight * (2 * excess + multiplier) / 2.5
            gradient[j] += slope * (-1 / sae.bandwidth) / len(X)
    found = evaluate(sae, X, dense, term="sparsity")
    expected = weight * (excess**2 + multiplier * excess)
    assert found.losses["sparsity"] == pytest.approx(expected)
    torch.testing.assert_close(found.gradients["threshold"].tolist(), gradient)
    assert max(map(abs, gradient)) > 0
    assert not any(found.gradients[name].any() for name in TENSORS)


def test_the_multiplier_moves_with_the_distance_to_the_target(build):
    sae = build(target_l0=2.5)
    excess = sum(v > theta for v, theta, _, _ in pairs(sae, X)[0]) / len(X) / 2.5 - 1
    assert 0 < abs(excess) < 1
    for n in range(1, 4):
        sae.objective(X)
        assert sae.multiplier.item() == pytest.approx(n * 0.02 * excess)
    with torch.no_grad():
        sae.threshold.fill_(100.0)  # nothing fires
    for _ in range(200):
        sae.objective(X)
    assert sae.multiplier == -1


@pytest.mark.parametrize("target_l0", [None, 2.5])
def test_the_count_does_not_see_the_norms_of_decoder_rows(target_l0, build, evaluate):
    unit, free = (build(target_l0=target_l0, decoder_norm=norm) for norm in ("unit", "free"))
    with torch.no_grad():
        free.load_state_dict(unit.state_dict())
        free.W_dec.mul_(torch.linspace(0.5, 5.0, 9).double()[:, None])
    expected, found = (evaluate(sae, X, term="sparsity") for sae in (unit, free))
    assert found.losses["sparsity"] == expected.losses["sparsity"] > 0
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=0, atol=0)
    assert expected.gradients["threshold"].any()


@pytest.mark.parametrize("dense", [True, False])
def test_a_penalty_on_activations_pulls_from_both_sides_of_the_threshold(dense, build, evaluate):
    sae = build(penalty=L1())
    entries, _ = pairs(sae, X)
    gradient, cost = [0.0] * 9, 0.0
    for v, theta, _, j in entries:
        cost += v if v > theta else 0.0
        if inside(sae, v, theta):
            gradient[j] -= 0.7 * theta / sae.bandwidth / len(X)
    found = evaluate(sae, X, dense, term="sparsity")
    assert found.losses["sparsity"] == pytest.approx(0.7 * cost / len(X))
    torch.testing.assert_close(found.gradients["threshold"].tolist(), gradient)
    assert min(gradient) < 0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"target_l0": 2.5},
        {"penalty": Log(3.0)},
        {"penalty": L1(), "decoder_norm": "free"},
        {"apply_b_dec_to_input": False},
    ],
    ids=str,
)
def test_both_layouts_have_the_same_gradients(arguments, build, evaluate, assert_same):
    sae = build(**arguments)
    assert_same(evaluate(sae, X, dense=True), evaluate(sae, X, dense=False))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_with_thresholds_of_zero_and_its_penalty_it_is_a_relu_sae(
    decoder_norm, dense, build, randomised, evaluate
):
    jumping = build(penalty=Log(3.0), decoder_norm=decoder_norm)
    with torch.no_grad():
        jumping.threshold.zero_()
    plain = ReLUSAE(4, 9, 0.7, penalty=Log(3.0), decoder_norm=decoder_norm).double()
    plain.load_state_dict({k: jumping.state_dict()[k] for k in plain.state_dict()})
    found, expected = evaluate(jumping, X, dense), evaluate(plain, X, dense)
    assert found.loss == pytest.approx(expected.loss)
    for name in TENSORS:
        torch.testing.assert_close(found.gradients[name], expected.gradients[name])
    torch.testing.assert_close(found.f, expected.f)
    torch.testing.assert_close(jumping.encode(X), plain.encode(X))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"target_l0": 2.0}, {"penalty": L1()}], ids=str)
def test_negative_thresholds_act_as_zero(arguments, dense, build, evaluate, assert_same):
    sae = build(**arguments)
    with torch.no_grad():
        sae.threshold.copy_(-torch.rand(9))
    negative = evaluate(sae, X, dense)
    latents = sae.encode(X)
    with torch.no_grad():
        sae.threshold.zero_()
    assert_same(negative, evaluate(sae, X, dense))
    torch.testing.assert_close(latents, sae.encode(X))


@pytest.mark.parametrize("dense", [True, False])
def test_dead_latents_are_pulled_to_their_threshold(dense, build, evaluate):
    sae = build(dead_coefficient=0.3)
    sae.silent_for[[0, 4, 8]] = sae.dead_after
    v = (X - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = 0.0
    for i in range(len(X)):
        for j in (0, 4, 8):
            missing = max(0.0, max(0.0, sae.threshold[j].item()) - v[i, j].item())
            expected += 0.3 * missing * sae.W_dec[j].norm().item() / len(X)
    found = evaluate(sae, X, dense, term="dead")
    assert found.losses["dead"] == pytest.approx(expected)
    living = [1, 2, 3, 5, 6, 7]
    for name, axis in (("W_enc", 1), ("b_enc", 0), ("threshold", 0), ("W_dec", 0)):
        gradient = found.gradients[name].movedim(axis, 0)
        assert not gradient[living].any()
        assert gradient[[0, 4, 8]].any()
    assert (found.gradients["threshold"][[0, 4, 8]] > 0).all()  # which lowers thresholds
    assert (found.gradients["b_enc"][[0, 4, 8]] < 0).all()  # and raises pre-activations
    sae.silent_for.zero_()
    assert evaluate(sae, X, dense).losses["dead"] == 0


class Rates(Callback):
    """Learning rates of each group at each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, *_):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("threshold_lr", [0.5, None])
def test_thresholds_have_their_own_rate_and_the_same_schedule(threshold_lr, scale, fit):
    """By default a hundredth of a standard deviation of the first batch's pre-activations."""
    sae = JumpReLUSAE(
        4,
        9,
        lr=0.1,
        threshold_lr=threshold_lr,
        lr_warmup_steps=2,
        lr_decay_steps=2,
        decoder_norm="free",
    )
    rates, x = Rates(), scale * torch.randn(5, 16, 4)
    unit = ((x[0] - x[0].mean(0)) @ sae.W_enc).std(correction=0).item()
    trainer = fit(sae, x, rates)
    assert sae.threshold_unit.item() == pytest.approx(unit)
    peak = threshold_lr or 0.01 * unit
    shares = [0.5, 1.0, 1.0, 1.0, 0.5]
    assert rates.seen == [pytest.approx([0.1 * s, peak * s]) for s in shares]
    others, thresholds = (group["params"] for group in trainer.optimizers[0].param_groups)
    assert [p is sae.threshold for p in thresholds] == [True]
    assert {id(p) for p in others} == {id(getattr(sae, name)) for name in TENSORS}


@pytest.mark.parametrize("target_l0", [None, 1.5, 9.0])
def test_thresholds_start_where_the_first_batch_has_the_target(target_l0, fit):
    """So many pre-activations are above them; without a target they are one deviation."""
    x = 7 * torch.randn(1, 64, 4)
    sae = JumpReLUSAE(4, 9, target_l0=target_l0, lr=1e-30)
    pre = (x[0] - x[0].mean(0)) @ sae.W_enc.detach()
    fit(sae, x, DecoderNormProjection())
    expected = pre.std(correction=0)
    if target_l0 is not None:
        expected = pre.flatten().sort(descending=True).values[int(64 * target_l0) - 1].relu()
    # One step has moved them.
    torch.testing.assert_close(
        sae.threshold.detach(), expected.expand(9), rtol=0, atol=1.01 * 0.01 * pre.std().item()
    )


@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_target_is_reached_whatever_the_scale_of_the_data(scale, fit):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 8, generator=generator), dim=-1)
    fires = torch.rand(416, 64, 24, generator=generator) < 0.15
    x = scale * (fires * torch.rand(fires.shape, generator=generator)) @ directions
    torch.manual_seed(1)
    sae = JumpReLUSAE(8, 48, target_l0=3.0, lr=3e-3 * scale**0.5)
    fit(sae, x[:-16], DecoderNormProjection())
    l0 = (sae.encode(x[-16:]) > 0).sum(-1).double().mean().item()
    assert l0 == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(("share", "missed"), [(0.93, True), (0.97, False), (1.03, False)])
def test_a_missed_target_is_reported_with_figures(share, missed, recwarn):
    """Of an L0 that does not move."""
    sae, x, l0 = still(share)
    warnings.simplefilter("always")
    trainer_for(4).fit(sae, DataLoader(x, batch_size=None))
    said = [str(each.message) for each in recwarn if "did not reach" in str(each.message)]
    assert len(said) == missed
    assert all(f"L0 is {l0:.3g} and not `target_l0`={sae.target_l0:g}" in line for line in said)


@pytest.mark.parametrize(("held_out", "said"), [(1.0, False), (0.0, True)])
def test_a_different_held_out_l0_is_reported(held_out, said, recwarn):
    """Held-out activations are zeros, on which no latent fires."""
    sae, x, _ = still(1.0)
    loaders = [DataLoader(rows, batch_size=None) for rows in (x, x[:1] * held_out)]
    warnings.simplefilter("always")
    trainer_for(4).fit(sae, *loaders)
    found = [str(each.message) for each in recwarn if "on held-out activations L0 is" in str(each)]
    assert len(found) == said


def still(share):
    """An SAE that learns nothing, for a share of its L0 as target; its data; and its L0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 64, 4, generator=generator).expand(4, -1, -1)
    torch.manual_seed(1)
    sae = JumpReLUSAE(
        4, 32, target_l0=1.0, threshold_init=0.1, threshold_lr=1e-30, lr=1e-30, b_dec_init="zero"
    )
    l0 = (sae.encode(x[0]) > 0).sum(-1).double().mean().item()
    sae.target_l0 = l0 * share
    return sae, x, l0


def trainer_for(max_steps):
    return Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )


def test_a_resumed_run_is_exact(fit, tmp_path):
    """The unit of the first batch and the multiplier go on, and so does the rate."""
    x, path = 9 * torch.randn(4, 64, 4), tmp_path / "a.ckpt"

    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        sae = JumpReLUSAE(4, 9, target_l0=1.5, lr=0.01)
        flags = {"max_steps": -1, "max_epochs": epochs, "ckpt_path": ckpt_path}
        return sae, fit(sae, x, DecoderNormProjection(), **flags)

    whole, _ = run(2)
    run(1)[1].save_checkpoint(path)
    resumed, _ = run(2, path)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_rate_of_thresholds_is_the_size_of_their_first_step(fit):
    """Adam's first step is the learning rate, where there is a gradient."""
    sae = JumpReLUSAE(4, 9, lr=1e-3, threshold_lr=0.02, threshold_init=0.3, bandwidth=0.5)
    fit(sae, torch.randn(1, 256, 4), DecoderNormProjection())
    moved = (sae.threshold - 0.3).abs()
    torch.testing.assert_close(moved.detach(), torch.full((9,), 0.02), rtol=1e-3, atol=0)


def test_thresholds_stay_in_float32_under_bfloat16(fit):
    """Steps far below a bfloat16's resolution at 1 are not lost."""
    sae = JumpReLUSAE(4, 9, threshold_init=1.0, threshold_lr=1e-5, bandwidth=2.0)
    fit(sae, torch.randn(3, 64, 4), DecoderNormProjection(), precision="bf16-mixed")
    assert sae.threshold.dtype == torch.float32
    assert sae.threshold.grad is None or sae.threshold.grad.dtype == torch.float32
    moved = (sae.threshold.detach().double() - 1).abs()
    assert (moved > 5e-6).any()
    assert (moved < 1e-4).all()
    assert ((sae.threshold.bfloat16().float() - sae.threshold).abs() > 0).any()


def test_the_distance_to_a_target_is_that_of_the_whole_batch(fit):
    """It is squared, so a mean over chunks of rows would be another number."""
    x, trained = torch.randn(2, 40, 4), []
    for chunk_rows in (None, 7):
        torch.manual_seed(0)
        sae = JumpReLUSAE(4, 9, 5.0, target_l0=1.0, lr=0.01, chunk_rows=chunk_rows)
        assert sae.layout.dense
        fit(sae, x, DecoderNormProjection())
        trained.append(sae.state_dict())
    torch.testing.assert_close(*trained)


def test_a_resampled_latent_gets_back_its_first_threshold(fit):
    sae = JumpReLUSAE(4, 3, lr=1e-30, b_dec_init="zero", threshold_init=0.1, threshold_lr=1e-30)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4)[:3])
        sae.W_enc.copy_(torch.eye(4)[:, :3])
        sae.threshold[2] = 100.0
    x = torch.rand(3, 16, 4) + 0.2
    fit(sae, x, DeadFeatureResampling(2), DecoderNormProjection())
    torch.testing.assert_close(sae.threshold.detach(), torch.full((3,), 0.1))
    assert (sae.encode(x)[..., 2] > 0).any()


def test_sparsity_grows_with_the_coefficient(fit):
    """Thresholds are what the count trains: without its pseudo-derivative L0 would not fall."""
    x, l0 = torch.randn(12, 64, 4), []
    for coefficient in (0.0, 1.0):
        torch.manual_seed(0)
        sae = JumpReLUSAE(
            4, 9, coefficient, lr=1e-4, threshold_lr=0.15, bandwidth=0.3, threshold_init=0.1
        )
        fit(sae, x, DecoderNormProjection())
        l0.append((sae.encode(x) > 0).sum(-1).double().mean().item())
    assert l0[1] < 0.5 * l0[0]


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="one of `target_l0` and `penalty` but got both"):
        JumpReLUSAE(4, 9, target_l0=3.0, penalty=L1())
    for name, value in {"bandwidth": 0.0, "target_l0": 0.0, "threshold_lr": 0.0}.items():
        with pytest.raises(ValueError, match=f"`{name}` to be positive but got 0"):
            JumpReLUSAE(4, 9, **{name: value})
    for name in ("l0_coefficient", "threshold_init", "dead_coefficient"):
        with pytest.raises(ValueError, match=f"`{name}` to be at least 0 but got -1"):
            JumpReLUSAE(4, 9, **{name: -1.0})
