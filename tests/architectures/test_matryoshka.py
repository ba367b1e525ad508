import pytest
import torch

from lightning_sae import BatchTopKSAE, MatryoshkaSAE, ReLUSAE
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup
from lightning_sae.functional.penalties import Log

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KINDS = [{"k": 2}, {"k": None}, {"k": None, "penalty": Log(3.0), "decoder_norm": "free"}]


def naive_error(sae, f, x, width):
    """Squared error of the reconstruction from the first latents, one example at a time."""
    total = 0.0
    for row, latents in zip(x.tolist(), f.tolist(), strict=True):
        x_hat = sae.b_dec.tolist()
        for j in range(width):
            x_hat = [a + latents[j] * w for a, w in zip(x_hat, sae.W_dec[j].tolist(), strict=True)]
        total += sum((a - b) ** 2 for a, b in zip(row, x_hat, strict=True))
    return total / len(x)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("arguments", KINDS, ids=str)
@pytest.mark.parametrize("prefixes", [(9,), (1, 9), (2, 5, 6, 9)])
def test_every_prefix_has_to_rebuild_the_input(prefixes, arguments, dense, randomised, evaluate):
    sae = randomised(MatryoshkaSAE(4, 9, prefixes, l1_coefficient=0.7, **arguments))
    found = evaluate(sae, X, dense)
    errors = [naive_error(sae, found.f, X, width) for width in prefixes]
    assert found.losses["squared_error"] == pytest.approx(sum(errors) / len(errors))
    x_hat = found.f @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(found.x_hat, x_hat.detach())
    if not sae.uses_relu:
        assert "l1" not in found.losses
    else:
        norms = sae.W_dec.norm(dim=-1) if sae.decoder_norm == "free" else torch.ones(9)
        cost = sae.penalty(found.f * norms).sum().item() / len(X)
        assert found.losses["l1"] == pytest.approx(0.7 * cost)


@pytest.mark.parametrize("arguments", [*KINDS, {"k": 2, "prefixes": 3}], ids=str)
def test_both_layouts_have_the_same_gradients(arguments, randomised, evaluate, assert_same):
    sae = randomised(MatryoshkaSAE(4, 9, **{"prefixes": (2, 5, 9), **arguments}))
    sae.silent_for[[1, 5]] = sae.dead_after
    assert_same(evaluate(sae, X, dense=True), evaluate(sae, X, dense=False))


@pytest.mark.parametrize("dense", [True, False])
def test_with_one_level_it_is_a_batch_topk_sae(dense, randomised, evaluate, assert_same):
    nested = randomised(MatryoshkaSAE(4, 9, (9,), k=2))
    plain = BatchTopKSAE(4, 9, k=2).double()
    plain.load_state_dict({name: nested.state_dict()[name] for name in plain.state_dict()})
    for sae in (nested, plain):
        sae.silent_for[[1, 5]] = sae.dead_after
        sae.objective(X)
    assert_same(evaluate(nested, X, dense), evaluate(plain, X, dense))
    torch.testing.assert_close(nested.encode(X), plain.encode(X))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("arguments", KINDS[1:], ids=str)
def test_with_one_level_and_a_relu_it_is_a_relu_sae(
    arguments, dense, randomised, evaluate, assert_same
):
    nested = randomised(MatryoshkaSAE(4, 9, (9,), l1_coefficient=0.7, revive="none", **arguments))
    plain = ReLUSAE(4, 9, 0.7, **{n: v for n, v in arguments.items() if n != "k"}).double()
    plain.load_state_dict({name: nested.state_dict()[name] for name in plain.state_dict()})
    assert_same(evaluate(nested, X, dense), evaluate(plain, X, dense))
    torch.testing.assert_close(nested.encode(X), plain.encode(X))


def test_a_decoder_row_is_trained_by_the_prefixes_that_have_it(randomised, evaluate):
    sae = randomised(MatryoshkaSAE(4, 9, (2, 5, 9), k=3))
    found = evaluate(sae, X)
    expected = torch.zeros_like(sae.W_dec)
    for width in (2, 5, 9):
        error = found.f[:, :width] @ sae.W_dec[:width] + sae.b_dec - X
        expected[:width] += 2 * found.f[:, :width].T @ error / len(X) / 3
    torch.testing.assert_close(found.gradients["W_dec"], expected.detach())


def widths_drawn(sae, times):
    return [tuple(sae._widths()) for _ in range(times)]


def test_drawn_prefixes_rise_up_to_all_latents_and_are_small_as_often_as_large():
    drawn = widths_drawn(MatryoshkaSAE(4, 1024, prefixes=4), 2000)
    assert all(widths == tuple(sorted(set(widths))) for widths in drawn)
    assert all(widths[-1] == 1024 and widths[0] >= 1 for widths in drawn)
    assert len(set(drawn)) > 1900
    # Of 3 numbers that are uniform on a logarithmic scale, as many lie below 32 as above.
    inner = torch.tensor([float(width) for widths in drawn for width in widths[:-1]])
    assert (inner < 32).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_draws_are_the_same_on_all_ranks_and_go_on_in_a_checkpoint():
    straight, other = (MatryoshkaSAE(4, 64, prefixes=4) for _ in range(2))
    torch.manual_seed(5)
    first = widths_drawn(straight, 3)
    torch.manual_seed(6)  # ranks have random numbers of their own
    assert widths_drawn(other, 3) == first
    resumed = MatryoshkaSAE(4, 64, prefixes=4)
    resumed.load_state_dict(straight.state_dict())
    assert widths_drawn(resumed, 3) == widths_drawn(straight, 3) != first


def test_one_drawn_prefix_is_all_latents():
    assert widths_drawn(MatryoshkaSAE(4, 64, prefixes=1), 3) == [(64,)] * 3


def test_chunks_are_taken_only_where_rows_are_independent():
    """Not where latents are chosen from the batch, nor where each chunk would draw prefixes."""
    assert MatryoshkaSAE(4, 9, (3, 9), k=None).rows_are_independent
    assert not MatryoshkaSAE(4, 9, 3, k=None).rows_are_independent
    assert not MatryoshkaSAE(4, 9, (3, 9), k=2).rows_are_independent


def test_its_penalty_may_warm_up_where_it_has_one(fit):
    x = torch.randn(3, 16, 4)
    fit(MatryoshkaSAE(4, 9, (3, 9), k=None), x, L1Warmup(2), DecoderNormProjection())
    with pytest.raises(ValueError, match="MatryoshkaSAE has none: remove the callback"):
        fit(MatryoshkaSAE(4, 9, (3, 9), k=2), x, L1Warmup(2), DecoderNormProjection())


@pytest.mark.parametrize("prefixes", [(), (3,), (9, 3), (3, 3, 9), (0, 9), (3, 10)])
def test_prefixes_must_rise_up_to_all_latents(prefixes):
    with pytest.raises(ValueError, match="`prefixes` to rise from 1 or more up to `d_sae`=9 but"):
        MatryoshkaSAE(4, 9, prefixes, k=2)


def test_at_least_one_prefix_is_drawn():
    with pytest.raises(ValueError, match="`prefixes` to be at least 1 but got 0"):
        MatryoshkaSAE(4, 9, 0, k=2)
