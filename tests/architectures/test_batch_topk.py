import copy

import pytest
import torch
from lightning.pytorch import Trainer

import lightning_sae
from lightning_sae import BatchTopKSAE, TopKSAE, ToyDataModule
from lightning_sae.callbacks import DecoderNormProjection, RunCheckpoint
from lightning_sae.callbacks.results import ExportSAE
from lightning_sae.functional.sparse.code import Code

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive_latents(pre, total):
    """The largest of the whole batch, one after the other, where they are positive."""
    places = [(i, j) for i in range(len(pre)) for j in range(pre.shape[1])]
    places.sort(key=lambda place: -pre[place].item())
    f = torch.zeros_like(pre)
    for place in places[:total]:
        f[place] = max(0.0, pre[place].item())
    return f


def pre_activations(sae, x):
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("k", "total"), [(1, 8), (2.5, 20), (0.06, 1), (9, 72)])
def test_latents_are_the_largest_of_the_batch(k, total, dense, randomised, evaluate):
    sae = randomised(BatchTopKSAE(4, 9, k))
    f = naive_latents(pre_activations(sae, X), total)
    found = evaluate(sae, X, dense)
    torch.testing.assert_close(found.f, f)
    x_hat = f @ sae.W_dec + sae.b_dec
    assert found.loss == pytest.approx((x_hat - X).square().sum().item() / len(X))


@pytest.mark.parametrize("k", [1, 2.5, 9])
def test_both_layouts_have_the_same_gradients(k, randomised, evaluate, assert_same):
    sae = randomised(BatchTopKSAE(4, 9, k))
    sae.silent_for[[1, 5]] = sae.dead_after
    assert_same(evaluate(sae, X, dense=True), evaluate(sae, X, dense=False))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("k", [1, 4])
def test_on_a_batch_of_one_it_is_a_topk_sae(k, dense, randomised, evaluate, assert_same):
    of_batch = randomised(BatchTopKSAE(4, 9, k))
    of_row = TopKSAE(4, 9, k).double()
    of_row.load_state_dict({n: of_batch.state_dict()[n] for n in of_row.state_dict()})
    for row in X.split(1):
        assert_same(evaluate(of_batch, row, dense), evaluate(of_row, row, dense))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("decay", [0.99, 0.75])
def test_the_threshold_is_a_running_mean_of_the_smallest_latent_led_on(decay, dense, randomised):
    sae = randomised(BatchTopKSAE(4, 9, 2, threshold_decay=decay))
    sae.layout.dense, sae.layout.thresholds = dense, ((-1.0, -1.0) if dense else (2.0, 2.0))
    assert sae.threshold == 0
    mean = behind = 0.0
    for n, x in enumerate(torch.randn(40, 8, 4, dtype=torch.float64), start=1):
        sae.objective(x)
        f = naive_latents(pre_activations(sae, x), 16)
        smallest = min(v for v in f.flatten().tolist() if v > 0)
        weight = max(1 - decay, min(1.0, 20 / n))
        mean += weight * (smallest - mean)
        behind += weight * (mean - behind)
        assert sae.threshold.item() == pytest.approx(2 * mean - behind)
        assert n > 20 or sae.threshold.item() == pytest.approx(smallest)
    before = copy.deepcopy(sae.state_dict())
    with torch.no_grad():
        sae.b_enc.sub_(1e3)
    sae.objective(X)  # nothing fires, so there is nothing to follow
    for name in ("threshold", "threshold_means", "threshold_batches"):
        assert torch.equal(sae.state_dict()[name], before[name])


def test_a_threshold_that_falls_steadily_is_followed_without_a_lag(randomised):
    """The smallest latent of batch n is 100 - n."""
    sae = randomised(BatchTopKSAE(4, 1, 1))
    for n in range(1, 1001):
        sae.follow(Code.of_matrix(torch.full((2, 1), 1100.0 - n, dtype=torch.float64)))
    assert sae.threshold.item() == pytest.approx(100, abs=3)
    assert sae.threshold_means[0].item() > 130  # the mean alone is late


def test_the_threshold_of_a_new_scaling_follows_the_new_batches_alone(randomised):
    sae = randomised(BatchTopKSAE(4, 9, 2))
    for _ in range(30):
        sae.objective(X)
    sae.adopt_scaling(torch.zeros(4), torch.tensor(3.0))
    sae.objective(5 * X)
    smallest = min(v for v in naive_latents(pre_activations(sae, 5 * X), 16).flatten() if v > 0)
    assert sae.threshold.item() == pytest.approx(smallest.item())


def test_a_batch_without_latents_leaves_the_threshold_unset(randomised):
    sae = randomised(BatchTopKSAE(4, 9, 2))
    with torch.no_grad():
        sae.b_enc.sub_(1e3)
    sae.objective(X)
    assert sae.threshold == 0


def test_without_a_threshold_a_trained_sae_is_exported_with_a_warning(fit, tmp_path):
    sae = BatchTopKSAE(4, 9, 2)
    sae.save_pretrained(tmp_path / "untrained")  # as it was made, which needs no warning
    with pytest.warns(UserWarning, match="All 8 activations of the first batch are zero"):
        fit(sae, torch.zeros(3, 8, 4))
    with pytest.warns(UserWarning, match=r"`BatchTopKSAE` has no threshold, .* not k=2\."):
        folder = sae.save_pretrained(tmp_path / "sae")
    loaded = lightning_sae.load(folder)
    assert loaded.threshold == 0
    torch.testing.assert_close(loaded.encode(X.float()), sae.encode(X.float()))


def test_outside_of_training_a_row_does_not_depend_on_its_batch(randomised):
    sae = randomised(BatchTopKSAE(4, 9, 2))
    torch.testing.assert_close(sae.encode(X), pre_activations(sae, X).relu())  # no batch seen yet
    sae.objective(X)
    pre = pre_activations(sae, X)
    expected = torch.where((pre >= sae.threshold) & (pre > 0), pre, 0.0)
    torch.testing.assert_close(sae.encode(X), expected)
    torch.testing.assert_close(torch.stack([sae.encode(row) for row in X]), expected)
    # With its own threshold the batch has the latents that were chosen from it.
    torch.testing.assert_close(expected, naive_latents(pre, 16))


def train(fit, steps=50, **arguments):
    """A trained SAE, and 1024 activations like those it was trained on."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    fires = torch.rand(steps + 16, 64, 12, generator=generator) < 0.2
    x = (fires * torch.rand(fires.shape, generator=generator)) @ directions
    torch.manual_seed(1)
    sae = BatchTopKSAE(8, 24, 3, lr=0.01, **arguments)
    return sae, fit(sae, x[:-16], DecoderNormProjection()), x[-16:].flatten(0, 1)


def test_outside_of_training_as_many_fire_as_in_training(fit):
    """Though what is chosen shrinks much while an SAE learns."""
    sae, _, x = train(fit, steps=100)
    l0 = (sae.encode(x) > 0).sum(-1).double()
    assert l0.mean().item() == pytest.approx(3, rel=0.05)
    assert l0.unique().numel() > 2  # shared out unevenly
    with torch.no_grad():
        sae.threshold.copy_(sae.threshold_means[0])
    assert (sae.encode(x) > 0).sum(-1).double().mean() < 2.9  # the mean alone is late


def test_a_calibrated_threshold_gives_k_latents_and_leaves_the_running_means(randomised):
    sae = randomised(BatchTopKSAE(4, 9, 2))
    sae.input_mean.fill_(0.3)
    sae.input_scale.fill_(2.0)
    sae.objective(X)
    before = copy.deepcopy(sae.state_dict())
    rows = torch.randn(100, 4, dtype=torch.float64)
    sae.calibrate(rows)
    pre = pre_activations(sae, 2 * (rows - 0.3))
    expected = naive_latents(pre, 200)
    assert (expected > 0).sum() == 200
    found = sae.encode(rows)
    assert (found > 0).sum() in (199, 200)  # the last may differ by rounding
    torch.testing.assert_close(found[found > 0] * 2, expected[found > 0])
    assert not torch.equal(sae.threshold, before.pop("threshold"))
    assert all(torch.equal(sae.state_dict()[name], w) for name, w in before.items())
    known = sae.threshold.clone()
    with torch.no_grad():
        sae.b_enc.sub_(1e3)
    sae.calibrate(rows)  # nothing fires
    assert torch.equal(sae.threshold, known)


def toy_run(root, ckpt_path=None, **flags):
    """A run on known features, whose weights move fast to the end."""
    torch.manual_seed(0)
    sae = BatchTopKSAE(16, 64, k=3, lr=0.01)
    data = ToyDataModule(24, 16, directions="random", batch_size=64, n_validation=65536)
    plain = ("logger", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(plain, False), "limit_val_batches": 0, **flags}
    trainer = Trainer(
        default_root_dir=root, accelerator="cpu", callbacks=[RunCheckpoint(7), ExportSAE()], **flags
    )
    trainer.fit(sae, datamodule=data, ckpt_path=ckpt_path)
    return sae, data


def test_a_run_ends_with_k_latents_on_unseen_activations(tmp_path):
    sae, data = toy_run(tmp_path, max_steps=60)
    unseen = torch.cat([*data.val_dataloader()])
    assert (sae.encode(unseen) > 0).sum(-1).double().mean().item() == pytest.approx(3, rel=0.02)
    mean, behind = sae.threshold_means
    running = copy.deepcopy(sae)
    running.threshold.copy_(2 * mean - behind)
    l0 = (running.encode(unseen) > 0).sum(-1).double().mean().item()
    assert abs(l0 - 3) > 0.06, "the running threshold would do"
    for path in (tmp_path / "checkpoints" / "last.ckpt", tmp_path / "sae"):
        assert torch.equal(lightning_sae.load(path).threshold, sae.threshold)


def test_a_prolonged_run_and_one_of_epochs_end_with_the_same_threshold(tmp_path):
    whole, _ = toy_run(tmp_path / "whole", max_steps=20)
    toy_run(tmp_path / "parts", max_steps=10)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    parts, _ = toy_run(tmp_path / "parts", last, max_steps=20)
    epochs, _ = toy_run(tmp_path / "epochs", max_epochs=2, limit_train_batches=10)
    for other in (parts, epochs):
        for name, w in whole.state_dict().items():
            assert torch.equal(w, other.state_dict()[name]), name


def test_the_threshold_is_in_checkpoints_and_folders(fit, tmp_path):
    sae, trainer, x = train(fit, steps=3)
    sae.input_scale.fill_(4.0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["threshold"], sae.threshold)
    folder = sae.save_pretrained(tmp_path / "sae")
    for path in (tmp_path / "a.ckpt", folder):
        torch.testing.assert_close(lightning_sae.load(path).encode(x), sae.encode(x))
    assert 0 < (sae.encode(x) > 0).double().mean() < 0.5


@pytest.mark.parametrize("k", [0, 9.5])
def test_there_must_be_k_latents(k):
    with pytest.raises(ValueError, match=f"`k` to be above 0 and at most `d_sae`=9 but got {k}"):
        BatchTopKSAE(4, 9, k)
