"""SAEs made by hand, on features that are known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.ground_truth import (
    absorption,
    activation_mcc,
    detection_f1,
    detection_precision,
    detection_recall,
    shrinkage,
)
from lightning_sae.functional.matching import best_features, best_latents, parent_in_child

FEATURES = torch.eye(6)[:4]
PAIRS = torch.tensor([[0, 1]])


def magnitudes(samples: int = 500) -> Tensor:
    """Four features of mean magnitude 2; the first fires whenever the second does."""
    fires = torch.rand(samples, 4) < 0.3
    fires[:, 0] |= fires[:, 1]
    return fires * (1.5 + torch.rand(samples, 4))


def perfect(a: Tensor) -> tuple[Tensor, Tensor]:
    return a, FEATURES


def absorbed(a: Tensor) -> tuple[Tensor, Tensor]:
    """The first latent is silent where the second fires, whose decoder has both features."""
    f, W_dec = a.clone(), FEATURES.clone()
    f[a[:, 1] > 0, 0] = 0
    f[:, 1] *= math.sqrt(2)
    W_dec[1] = torch.tensor([1.0, 1.0, 0, 0, 0, 0]) / math.sqrt(2)
    return f, W_dec


def test_the_perfect_sae_detects_all_and_shrinks_nothing() -> None:
    f, W_dec = perfect(a := magnitudes())
    matching = best_features(W_dec, FEATURES)
    for function in (detection_precision, detection_recall, detection_f1):
        assert function(f, a, matching).tolist() == [1.0] * 4
    torch.testing.assert_close(
        shrinkage(f, a, W_dec, FEATURES, matching), torch.ones(4, dtype=torch.float64)
    )
    assert absorption(f, a, PAIRS, best_latents(W_dec, FEATURES)).tolist() == [0.0]
    assert activation_mcc(f, a).item() == pytest.approx(1)


def test_the_order_of_latents_does_not_matter() -> None:
    f, W_dec = absorbed(a := magnitudes())
    order = torch.randperm(4)
    matching, permuted = best_features(W_dec, FEATURES), best_features(W_dec[order], FEATURES)
    for function in (detection_precision, detection_recall, detection_f1):
        torch.testing.assert_close(
            function(f[:, order], a, permuted), function(f, a, matching)[order]
        )
    torch.testing.assert_close(
        shrinkage(f[:, order], a, W_dec[order], FEATURES, permuted),
        shrinkage(f, a, W_dec, FEATURES, matching)[order],
    )
    torch.testing.assert_close(
        absorption(f[:, order], a, PAIRS, best_latents(W_dec[order], FEATURES)),
        absorption(f, a, PAIRS, best_latents(W_dec, FEATURES)),
    )
    torch.testing.assert_close(activation_mcc(f[:, order], a), activation_mcc(f, a))


def test_absorption_is_seen_in_the_parents_silence_and_recall_and_in_the_childs_decoder() -> None:
    f, W_dec = absorbed(a := magnitudes())
    latents = best_latents(W_dec, FEATURES)
    assert latents.tolist() == [0, 1, 2, 3]
    assert absorption(f, a, PAIRS, latents).tolist() == [1.0]
    assert absorption(f, a, PAIRS, latents, with_child=False).tolist() == [0.0]
    assert parent_in_child(W_dec, FEATURES, PAIRS).item() == pytest.approx(1 / math.sqrt(2))
    matching = torch.arange(4)
    share = (a[:, 1] > 0).sum() / (a[:, 0] > 0).sum()
    recall = detection_recall(f, a, matching)
    assert recall[0].item() == pytest.approx(1 - share.item())
    assert recall[1:].tolist() == [1.0] * 3
    assert detection_precision(f, a, matching).tolist() == [1.0] * 4


def test_absorption_on_half_of_the_childs_firings_is_half() -> None:
    a = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0]] * 4 + [[0.0, 0.0]])
    f = a.clone()
    f[:2, 0] = 0
    f[4, 0] = 0
    pairs, latents = torch.tensor([[0, 1]]), torch.tensor([0, 1])
    assert absorption(f, a, pairs, latents).tolist() == [0.5]
    assert absorption(f, a, pairs, latents, with_child=False).tolist() == [0.25]


def test_a_child_that_fires_without_its_parent_is_left_out() -> None:
    a, f = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert absorption(f, a, torch.tensor([[0, 1]]), torch.tensor([0, 1])).tolist() == [0.0]


@pytest.mark.parametrize("length", [1.0, 0.5, 3.0])
def test_the_closed_form_of_shrinkage(length: float) -> None:
    """A penalty p makes a magnitude g into g - p/2, however latent and decoder share it."""
    g, penalty = 2.0, 0.6
    a = g * (torch.rand(300, 4) < 0.3)
    f = (a - penalty / 2).relu() / length
    ratio = shrinkage(f, a, length * FEATURES, FEATURES, torch.arange(4))
    torch.testing.assert_close(
        ratio, torch.full((4,), 1 - penalty / (2 * g), dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_shrinkage_looks_along_the_feature_and_where_both_fire() -> None:
    W_dec = torch.tensor([[0.6, 0.8]])  # of which the feature sees 0.6
    a, f = torch.tensor([[2.0], [4.0], [0.0], [8.0]]), torch.tensor([[2.0], [1.0], [5.0], [0.0]])
    ratio = shrinkage(f, a, W_dec, torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
    assert ratio.item() == pytest.approx(0.6 * 3 / 6)


def test_detection_counts_by_hand() -> None:
    f = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0], [0.0, 0.0]])
    matching = torch.tensor([0, 1, 1])
    assert detection_precision(f, a, matching)[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert detection_recall(f, a, matching).tolist() == pytest.approx([2 / 3, 1, 0])
    assert detection_f1(f, a, matching).tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    assert detection_precision(f, a, matching)[2].isnan()


def test_f1_is_the_harmonic_mean() -> None:
    f, a, matching = torch.randn(200, 7).relu(), magnitudes(200), torch.randint(4, (7,))
    precision, recall = detection_precision(f, a, matching), detection_recall(f, a, matching)
    torch.testing.assert_close(
        detection_f1(f, a, matching), 2 * precision * recall / (precision + recall)
    )


def test_correlation_is_pearsons_over_the_best_matching() -> None:
    f, a = torch.randn(50, 3).relu(), torch.randn(50, 5).relu()
    table = torch.corrcoef(torch.cat([f, a], dim=1).double().T)[:3, 3:].abs()
    best = max(
        (table[0, i] + table[1, j] + table[2, k]).item() / 3
        for i in range(5)
        for j in range(5)
        for k in range(5)
        if len({i, j, k}) == 3
    )
    assert activation_mcc(f, a).item() == pytest.approx(best)


def test_correlation_of_what_does_not_vary_is_0() -> None:
    a = magnitudes()
    f = a.clone()
    f[:, 3] = 0
    assert activation_mcc(f, a).item() == pytest.approx(3 / 4)
    assert activation_mcc(f + 7, a).item() == pytest.approx(3 / 4)


Function = Callable[[Tensor, Tensor], Tensor]
FUNCTIONS: list[Function] = [
    lambda f, a: detection_precision(f, a, torch.arange(4)),
    lambda f, a: detection_recall(f, a, torch.arange(4)),
    lambda f, a: detection_f1(f, a, torch.arange(4)),
    lambda f, a: shrinkage(f, a, FEATURES, FEATURES, torch.arange(4)),
    lambda f, a: absorption(f, a, PAIRS, torch.arange(4)),
    activation_mcc,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_leading_axes_are_all_sample_axes(function: Function) -> None:
    f, a = torch.randn(5, 60, 4).relu(), magnitudes(300).view(5, 60, 4)
    assert torch.equal(function(f, a), function(f.view(-1, 4), a.view(-1, 4)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_latents_and_magnitudes_of_different_samples_are_refused(function: Function) -> None:
    with pytest.raises(ValueError, match=r"same leading axes but got shapes \(3, 4\) and \(2, 4\)"):
        function(torch.ones(3, 4), torch.ones(2, 4))
