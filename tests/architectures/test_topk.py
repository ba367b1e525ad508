import pytest
import torch

from lightning_sae import ReLUSAE, TopKSAE
from lightning_sae.callbacks import DecoderNormProjection

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive_latents(pre, k):
    """The k largest of each row, one after the other, where they are positive."""
    found = []
    for row in pre.tolist():
        largest = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        found.append([max(0.0, v) if j in largest else 0.0 for j, v in enumerate(row)])
    return torch.tensor(found, dtype=pre.dtype)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_latents_are_the_largest_of_each_row(k, dense, randomised, evaluate):
    sae = randomised(TopKSAE(4, 9, k))
    f = naive_latents((X - sae.b_dec) @ sae.W_enc + sae.b_enc, k)
    found = evaluate(sae, X, dense)
    torch.testing.assert_close(found.f, f)
    torch.testing.assert_close(sae.encode(X), f)
    error = sum((r - r_hat).square().sum() for r, r_hat in zip(X, sae(X), strict=True)) / len(X)
    assert found.losses["squared_error"] == pytest.approx(error.item())
    assert found.loss == pytest.approx(error.item())  # nothing is dead


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_both_layouts_have_the_same_gradients(
    k, apply_b_dec_to_input, randomised, evaluate, assert_same
):
    sae = randomised(TopKSAE(4, 9, k, apply_b_dec_to_input=apply_b_dec_to_input))
    sae.silent_for[[1, 5]] = sae.dead_after
    assert_same(evaluate(sae, X, dense=True), evaluate(sae, X, dense=False))


@pytest.mark.parametrize("dense", [True, False])
def test_with_room_for_all_it_is_a_relu_sae_without_a_penalty(dense, randomised, evaluate):
    every = randomised(TopKSAE(4, 9, 9))
    plain = ReLUSAE(4, 9, 0.0).double()
    plain.load_state_dict(every.state_dict())
    found, expected = evaluate(every, X, dense), evaluate(plain, X, dense)
    assert found.loss == pytest.approx(expected.loss)
    torch.testing.assert_close(found.gradients, expected.gradients)


def test_a_row_does_not_depend_on_those_beside_it(randomised):
    sae = randomised(TopKSAE(4, 9, 2))
    torch.testing.assert_close(
        sae.encode(X.view(2, 4, 4)).flatten(0, 1), torch.stack([sae.encode(row) for row in X])
    )


def test_a_step_is_sparse_from_the_first_one_on(fit):
    sae = TopKSAE(8, 64, 4)
    assert not sae.layout.dense
    fit(sae, torch.randn(2, 16, 8), DecoderNormProjection())
    assert not sae.layout.dense
    assert (sae.encode(torch.randn(50, 8)) > 0).sum(-1).max() == 4


@pytest.mark.parametrize("k", [0, 10])
def test_there_must_be_k_latents(k):
    with pytest.raises(ValueError, match=f"`k` to be above 0 and at most `d_sae`=9 but got {k}"):
        TopKSAE(4, 9, k)
