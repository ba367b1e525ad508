"""What holds for every architecture."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_sae
from lightning_sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    RescaledSAE,
    TiedSAE,
    TopKSAE,
    architectures,
)
from lightning_sae.callbacks import (
    DeadFeatureResampling,
    DecoderNormProjection,
    ExportSAE,
    Histograms,
    L1Warmup,
    RunCheckpoint,
)
from lightning_sae.functional.penalties import Sqrt, Tanh
from lightning_sae.functional.revival import auxk, ghost_gradients
from lightning_sae.functional.sparse.code import Layout

D_IN, D_SAE = 5, 24

ALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (ReLUSAE, {"l1_coefficient": 0.1}),
    "relu-sqrt": (ReLUSAE, {"l1_coefficient": 0.1, "penalty": Sqrt(epsilon=0.01)}),
    "tied": (TiedSAE, {"l1_coefficient": 0.1}),
    "tied-jump": (TiedSAE, {"l1_coefficient": 0.1, "threshold_init": 0.1, "bandwidth": 0.5}),
    "gated": (GatedSAE, {"l1_coefficient": 0.1}),
    "rescaled": (RescaleAndShiftSAE, {"l1_coefficient": 0.1}),
    "jumprelu": (JumpReLUSAE, {"l0_coefficient": 0.1, "bandwidth": 0.5, "threshold_lr": 0.01}),
    "jumprelu-target": (JumpReLUSAE, {"target_l0": 3, "bandwidth": 0.5, "dead_coefficient": 0.1}),
    "jumprelu-tanh": (JumpReLUSAE, {"penalty": Tanh(2.0), "threshold_init": 0.2}),
    "topk": (TopKSAE, {"k": 3}),
    "batch-topk": (BatchTopKSAE, {"k": 2.5}),
    "matryoshka": (MatryoshkaSAE, {"k": 3, "prefixes": (4, 12, D_SAE)}),
    "matryoshka-drawn": (MatryoshkaSAE, {"k": 3, "prefixes": 3}),
    "matryoshka-relu": (MatryoshkaSAE, {"k": None, "prefixes": 3, "l1_coefficient": 0.1}),
}


@pytest.fixture(params=ALL)
def build(request):
    """Builds an SAE of one architecture after the other."""
    architecture, own = ALL[request.param]

    def build(**arguments):
        return architecture(D_IN, D_SAE, **{**own, **arguments})

    return build


def test_every_architecture_of_the_package_is_here():
    named = {getattr(architectures, name) for name in architectures.__all__}
    elsewhere = {architectures.SparseAutoencoder, RescaledSAE}  # it begins with a trained SAE
    assert named == {kind for kind, _ in ALL.values()} | elsewhere
    assert all(getattr(lightning_sae, kind.__name__) is kind for kind in named)


def trained(build, fit, **arguments):
    sae = build(lr=0.01, **arguments)
    return sae, fit(sae, torch.randn(3, 16, D_IN) + 1, DecoderNormProjection())


# What users call.


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_leading_axes_are_kept(shape, build):
    sae, x = build(), torch.randn(*shape, D_IN)
    f = sae.encode(x)
    assert f.shape == (*shape, D_SAE)
    assert (f >= 0).all()
    assert sae(x).shape == x.shape
    torch.testing.assert_close(sae(x), sae.decode(f))
    rows = x.reshape(-1, D_IN)
    torch.testing.assert_close(f.reshape(-1, D_SAE), sae.encode(rows))


def test_it_can_be_copied_and_pickled(build, fit):
    sae, _ = trained(build, fit)
    x = torch.randn(4, D_IN)
    sae.trainer = None
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        torch.testing.assert_close(other.encode(x), sae.encode(x))


# Saving.


def off_centre(sae):
    """Weights of training on centred and scaled inputs, all of them random."""
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.b_enc.sub_(1.0)
        if isinstance(sae, TiedSAE):
            sae.b_enc.zero_()
    sae.input_mean.copy_(torch.randn(D_IN))
    sae.input_scale.fill_(3.0)
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_saved_sae_acts_on_raw_activations_as_before(build, apply_b_dec_to_input, tmp_path):
    sae = off_centre(build(apply_b_dec_to_input=apply_b_dec_to_input, betas=(0.5, 0.9)))
    sae.objective(sae.scaled(torch.randn(50, D_IN)))  # a threshold that follows batches does so now
    x = torch.randn(50, D_IN)  # others, for a value equal to the threshold may round to either side
    sae.source = {"hook_name": "somewhere"}
    loaded = lightning_sae.load(sae.save_pretrained(tmp_path / "sae"))
    assert type(loaded) is type(sae)
    assert loaded.source == sae.source
    assert torch.equal(loaded.input_scale, torch.ones(()))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-5)
    assert 0.02 < (sae.encode(x) > 0).double().mean() < 0.98
    assert dict(loaded.hparams) == dict(sae.hparams)  # down to the penalty
    assert getattr(loaded, "penalty", None) == getattr(sae, "penalty", None)


def test_a_checkpoint_loads_as_what_was_trained(build, fit, tmp_path):
    sae, trainer = trained(build, fit)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded, x = lightning_sae.load(tmp_path / "a.ckpt"), torch.randn(20, D_IN) + 1
    assert type(loaded) is type(sae)
    assert not loaded.training
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert getattr(loaded, "penalty", None) == getattr(sae, "penalty", None)
    assert (loaded.encode(x) > 0).any()


# Training.


def callbacks_for(sae) -> list[Callback]:
    warmup = [] if sae.coefficient_name is None else [L1Warmup(4)]
    return [DecoderNormProjection(), *warmup, DeadFeatureResampling(2, n_inputs=40)]


def switched(sae):
    """Its layout changes after the first batch, which a checkpoint then has to say."""
    sae.layout.thresholds = (0.95, 0.99) if sae.layout.dense else (-1.0, -1.0)
    return sae


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains_with_all_callbacks(build, precision, fit, tmp_path):
    sae = build(lr=0.02, dead_after=32, clip_grad_norm=100.0)
    x = torch.randn(40, 16, D_IN, generator=torch.Generator().manual_seed(0))
    untrained = (sae(x) - x).square().sum(-1).mean()
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    added = [RunCheckpoint(5), ExportSAE(), Histograms()]
    trainer = fit(
        sae,
        x,
        *callbacks_for(sae),
        *added,
        default_root_dir=tmp_path,
        logger=logger,
        enable_checkpointing=True,
        max_steps=-1,
        max_epochs=1,
        accumulate_grad_batches=2,
        precision=precision,
        log_every_n_steps=1,
    )
    assert trainer.global_step == 20
    assert (sae(x) - x).square().sum(-1).mean() < 0.9 * untrained
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in sae.parameters())
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    exported = lightning_sae.load(tmp_path / "sae")
    torch.testing.assert_close(exported.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    if sae.coefficient_name is not None:
        assert sae.penalty_scale == 1


def test_a_resumed_run_is_the_one_that_was_not_stopped(build, fit, tmp_path):
    x = torch.randn(3, 16, D_IN, generator=torch.Generator().manual_seed(0))
    arguments = {"lr": 0.02, "dead_after": 32}

    def run(seed, epochs, **flags):
        torch.manual_seed(seed)
        sae = switched(build(**arguments))
        return sae, fit(sae, x, *callbacks_for(sae), max_steps=-1, max_epochs=epochs, **flags)

    straight, _ = run(0, 2)
    stopped, trainer = run(0, 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = run(1, 2, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    assert (
        resumed.layout.dense
        == straight.layout.dense
        == stopped.layout.dense
        != build().layout.dense
    )
    for name, expected in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name
    assert not torch.equal(stopped.W_dec, straight.W_dec)


class GradientsOfStep(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad}


def test_accumulated_gradients_are_the_mean_of_those_of_micro_batches(build, fit):
    sae = build(b_dec_init="zero", decoder_norm="free")
    sae.is_trained = True  # nothing starts from the first micro-batch
    batches, alone, expected = torch.randn(2, 16, D_IN), copy.deepcopy(sae), {}
    for x in batches:  # in turn, for prefixes are drawn anew each time
        loss = torch.stack(list(alone.objective(x).losses.values())).sum()
        loss.backward()
    expected = {n: p.grad / 2 for n, p in alone.named_parameters() if p.requires_grad}
    step = GradientsOfStep()
    fit(sae, batches, step, accumulate_grad_batches=2, max_steps=1)
    torch.testing.assert_close(step.seen, expected)


# One product with the whole dictionary.


class Products(TorchDispatchMode):
    """Counts products of matrices that have an entry for each row and latent."""

    KINDS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "mv")

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.shapes = {(rows, D_SAE), (D_SAE, rows)}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in {getattr(torch.ops.aten, kind) for kind in self.KINDS}:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            whole = [t for t in tensors if t.layout == torch.strided and t.shape in self.shapes]
            self.count += bool(whole)
        return result


def products_of_a_step(sae, dense: bool) -> int:
    sae.layout = Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))
    with Products(rows=30) as products:
        torch.stack(list(sae.objective(torch.randn(30, D_IN)).losses.values())).sum().backward()
    return products.count


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_sparse_step_has_one_product_with_the_whole_dictionary(build, apply_b_dec_to_input):
    sae = build(apply_b_dec_to_input=apply_b_dec_to_input, decoder_norm="free")
    assert products_of_a_step(sae, dense=False) == 1
    assert products_of_a_step(sae, dense=True) >= 5  # so that counting is known to work


# Bringing dead latents back.

DEAD = [1, 6, 7, 20]
LIVING = [j for j in range(D_SAE) if j not in DEAD]
LOSSES = {"auxk": lambda e, v, W: auxk(e, v, W, 3), "ghost": ghost_gradients}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("revive", LOSSES)
def test_dead_latents_rebuild_the_error_and_they_alone_are_moved(
    revive, dense, build, randomised, evaluate
):
    sae = randomised(build(revive=revive, revive_coefficient=0.3, k_aux=3))
    sae.silent_for[DEAD] = sae.dead_after
    x = torch.randn(30, D_IN, dtype=torch.float64)
    found = evaluate(sae, x, dense, term=revive)
    pre = (x - sae.b_dec) @ sae.W_enc[:, DEAD] + sae.b_enc[DEAD]
    expected = 0.3 * LOSSES[revive](x - found.x_hat, pre, sae.W_dec[DEAD])
    if revive == "auxk":  # relative to the error's variance, so it counts against that of x
        expected = expected * (x - x.mean(0)).square().sum() / len(x)
    assert found.losses[revive] == pytest.approx(expected.item())
    axes = {"W_enc": 1, "W_dec": 0, "b_enc": 0}
    for name, gradient in found.gradients.items():
        rows = gradient.movedim(axes.get(name, 0), 0)
        if name in axes:
            assert rows[DEAD].flatten(1).any(-1).all() if rows.ndim > 1 else rows[DEAD].all()
            assert not rows[LIVING].any()
        else:  # not the decoder's bias, nor thresholds and the like
            assert not rows.any()
    sae.silent_for.zero_()
    assert evaluate(sae, x, dense).losses[revive] == 0


@pytest.mark.parametrize("revive", LOSSES)
def test_revival_in_chunks_of_rows_is_that_of_the_batch(revive, build, fit):
    """It is measured against the error of all rows together."""
    x, states = torch.randn(2, 30, D_IN), []
    for chunk_rows in (None, 7):
        torch.manual_seed(0)
        sae = build(revive=revive, revive_coefficient=5.0, lr=0.01, chunk_rows=chunk_rows)
        sae.layout = Layout(dense=True, thresholds=(-1.0, -1.0))
        sae.silent_for[DEAD] = sae.dead_after
        with torch.no_grad():
            sae.b_enc[DEAD] = -100.0
        if isinstance(sae, TiedSAE):
            sae.b_enc.zero_()
        fit(sae, x, DecoderNormProjection(), precision="64-true")
        states.append(sae.state_dict())
    torch.testing.assert_close(states[0], states[1])


def features(steps: int) -> Tensor:
    """Batches in which four directions fire, each now and then."""
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(steps, 64, 4, generator=generator) < 0.3
    return fires * (1 + torch.rand(fires.shape, generator=generator))


REVIVED = {
    "relu": (ReLUSAE, {"l1_coefficient": 0.1}),
    "gated": (GatedSAE, {"l1_coefficient": 0.1}),
    "jumprelu": (JumpReLUSAE, {"l0_coefficient": 0.01}),
    "topk": (TopKSAE, {"k": 2}),
    "batch-topk": (BatchTopKSAE, {"k": 2}),
}


@pytest.mark.parametrize("name", REVIVED)
@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_a_dead_latent_comes_to_life(name, fit):
    """Its pre-activations are all negative; the others have learnt all features but its own."""
    kind, own = REVIVED[name]
    silent = {}
    for revive in ("none", "auxk", "ghost"):
        sae = kind(4, 4, lr=0.05, revive=revive, dead_after=64, b_dec_init="zero", **own)
        with torch.no_grad():
            sae.W_dec.copy_(torch.eye(4))
            sae.W_enc.copy_(torch.eye(4))
            sae.W_dec[0], sae.W_enc[:, 0] = 0.5, 0.25
            sae.b_enc[0] = -2.5  # the sum of a row is at most 8
        x = features(100)
        fit(sae, x, DecoderNormProjection())
        silent[revive] = int(sae.silent_for[0])
    assert silent == {"none": 6400, "auxk": 0, "ghost": 0}


def test_words_and_numbers_of_revival_are_checked(unchecked):
    with pytest.raises(ValueError, match="`revive` to be one of .* but got 'prayer'"):
        TopKSAE(4, 9, 2, revive="prayer")
    with pytest.raises(ValueError, match="`k_aux` to be positive but got -1"):
        TopKSAE(4, 9, 2, k_aux=-1)
    assert not Path("checkpoints").exists()


def test_there_are_eight_latents_for_each_dimension_by_default(tmp_path: Path) -> None:
    for name, (kind, arguments) in ALL.items():
        given = {k: v for k, v in arguments.items() if k != "prefixes"}
        sae = kind(3, **given)
        assert sae.d_sae == sae.hparams["d_sae"] == sae.hparams_initial["d_sae"] == 24
        assert sae.encode(torch.randn(2, 3)).shape == (2, 24)
        loaded = lightning_sae.load(sae.save_pretrained(tmp_path / name))
        assert loaded.d_sae == 24
