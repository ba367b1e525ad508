import math

import pytest
import torch
from torch import Tensor

from lightning_sae.functional import (
    kl_divergence,
    loss_recovered,
    next_token_cross_entropy,
    perplexity,
)

BATCH, SEQ, VOCAB = 3, 5, 7


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, others = 3 * torch.randn(BATCH, SEQ, VOCAB), 3 * torch.randn(BATCH, SEQ, VOCAB)
    return logits, others, torch.randint(VOCAB, (BATCH, SEQ)), torch.rand(BATCH, SEQ) > 0.4


def log_softmax(logits: list[float]) -> list[float]:
    log_sum = math.log(math.fsum(math.exp(value) for value in logits))
    return [value - log_sum for value in logits]


def counted(mask: Tensor) -> list[tuple[int, int]]:
    return [(b, t) for b in range(BATCH) for t in range(SEQ - 1) if mask[b, t + 1]]


def test_cross_entropy_equals_a_naive_loop() -> None:
    logits, _, tokens, mask = inputs()
    nats = [-log_softmax(logits[b, t].tolist())[tokens[b, t + 1]] for b, t in counted(mask)]
    total, count = next_token_cross_entropy(logits, tokens, mask)
    assert total.item() == pytest.approx(math.fsum(nats), rel=1e-6)
    assert count.item() == len(nats)


def test_kl_equals_a_naive_loop_and_has_a_direction() -> None:
    clean, spliced, _, mask = inputs()
    nats = []
    for b, t in counted(mask):
        p, q = log_softmax(clean[b, t].tolist()), log_softmax(spliced[b, t].tolist())
        nats.append(math.fsum(math.exp(i) * (i - j) for i, j in zip(p, q, strict=True)))
    total, count = kl_divergence(clean, spliced, mask)
    assert total.item() == pytest.approx(math.fsum(nats), rel=1e-5)
    assert count.item() == len(nats)
    assert kl_divergence(spliced, clean, mask)[0].item() != pytest.approx(total.item(), rel=1e-3)


def test_sums_are_float64_and_counts_int64() -> None:
    logits, others, tokens, mask = inputs()
    for total, count in (
        next_token_cross_entropy(logits.bfloat16(), tokens, mask),
        kl_divergence(logits.bfloat16(), others.bfloat16(), mask),
    ):
        assert (total.dtype, count.dtype) == (torch.float64, torch.int64)


def test_half_precision_logits_are_softmaxed_in_float32() -> None:
    logits, others, tokens, _ = (t.bfloat16() if t.is_floating_point() else t for t in inputs())
    ours = next_token_cross_entropy(logits, tokens)[0]
    assert torch.equal(ours, next_token_cross_entropy(logits.float(), tokens)[0])
    kl = kl_divergence(logits, others)[0]
    assert torch.equal(kl, kl_divergence(logits.float(), others.float())[0])


def test_without_a_mask_all_but_the_last_position_count() -> None:
    logits, others, tokens, _ = inputs()
    everything = torch.ones(BATCH, SEQ, dtype=torch.bool)
    assert next_token_cross_entropy(logits, tokens)[1].item() == BATCH * (SEQ - 1)
    assert next_token_cross_entropy(logits, tokens) == next_token_cross_entropy(
        logits, tokens, everything
    )
    assert kl_divergence(logits, others) == kl_divergence(logits, others, everything)


def test_the_mask_selects_targets_not_predicting_positions() -> None:
    logits, others, tokens, _ = inputs()
    mask = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    mask[1, 2] = True  # counts the prediction made at position 1
    expected = -logits[1, 1].log_softmax(-1)[tokens[1, 2]]
    total, count = next_token_cross_entropy(logits, tokens, mask)
    assert total.item() == pytest.approx(expected.item())
    assert count.item() == 1
    changed = others.clone()
    changed[1, 1] = logits[1, 1]
    assert kl_divergence(logits, changed, mask)[0].item() == 0
    assert kl_divergence(logits, others, mask)[0].item() > 0.01


def test_the_first_token_is_no_target() -> None:
    logits, others, tokens, _ = inputs()
    mask = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    mask[:, 0] = True
    assert [t.item() for t in next_token_cross_entropy(logits, tokens, mask)] == [0, 0]
    assert [t.item() for t in kl_divergence(logits, others, mask)] == [0, 0]


def test_sums_and_counts_add_up_over_batches() -> None:
    logits, _, tokens, mask = inputs()
    parts = [next_token_cross_entropy(logits[i], tokens[i], mask[i]) for i in ([0], [1, 2])]
    total, count = next_token_cross_entropy(logits, tokens, mask)
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item())
    assert sum(part[1].item() for part in parts) == count.item()


def test_kl_of_equal_predictions_is_0_and_an_offset_of_the_logits_changes_nothing() -> None:
    logits, _, _, _ = inputs()
    assert kl_divergence(logits, logits)[0].item() == 0
    assert kl_divergence(logits, logits + 4)[0].item() == pytest.approx(0, abs=1e-5)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    total, count = next_token_cross_entropy(
        torch.zeros(BATCH, SEQ, VOCAB), torch.zeros(BATCH, SEQ, dtype=torch.int64)
    )
    assert perplexity(total / count).item() == pytest.approx(VOCAB)


@pytest.mark.parametrize(("spliced", "share"), [(3.0, 1.0), (8.0, 0.0), (4.0, 0.8), (9.0, -0.2)])
def test_loss_recovered_is_linear_between_ablation_and_clean(spliced: float, share: float) -> None:
    assert loss_recovered(3.0, spliced, 8.0).item() == pytest.approx(share)
    tensors = [torch.tensor(value) for value in (3.0, spliced, 8.0)]
    assert loss_recovered(*tensors).item() == pytest.approx(share)


def test_loss_recovered_of_a_free_ablation_is_no_number() -> None:
    assert loss_recovered(3.0, 3.0, 3.0).isnan()


@pytest.fixture
def _as_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.mark.usefixtures("_as_users")
def test_shapes_that_do_not_fit_are_refused_with_both() -> None:
    logits, others, tokens, mask = inputs()
    with pytest.raises(ValueError, match=r"`tokens` of shape \(3, 5\) to go .* got \(3, 4\)"):
        next_token_cross_entropy(logits, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"`mask` of shape \(3, 5\) to go .* got \(3, 4\)"):
        next_token_cross_entropy(logits, tokens, mask[:, 1:])
    with pytest.raises(ValueError, match=r"`spliced_logits` of shape \(3, 5, 7\) .* \(3, 4, 7\)"):
        kl_divergence(logits, others[:, 1:])
    with pytest.raises(ValueError, match=r"\[batch, seq, vocab\], but got \(5, 7\): unsqueeze"):
        kl_divergence(logits[0], others[0])


@pytest.mark.usefixtures("_as_users")
def test_a_mask_of_integers_is_refused() -> None:
    logits, _, tokens, mask = inputs()
    with pytest.raises(ValueError, match=r"boolean, but got torch.int64: pass `mask.bool\(\)`"):
        next_token_cross_entropy(logits, tokens, mask.long())
