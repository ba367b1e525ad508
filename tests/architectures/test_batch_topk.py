import copy
import math

import pytest
import torch

import lightning_sae
from lightning_sae import BatchTopKSAE, TopKSAE
from lightning_sae.callbacks import DecoderNormProjection
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
    assert sae.threshold == -math.inf
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
    assert sae.threshold == -math.inf


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
