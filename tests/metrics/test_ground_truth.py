import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sae.functional import ground_truth as functional
from lightning_sae.functional.matching import best_features, duplicates
from lightning_sae.metrics.ground_truth import (
    Absorption,
    ActivationMCC,
    DetectionF1,
    DetectionPrecision,
    DetectionRecall,
    DuplicateFraction,
    Shrinkage,
    ground_truth_metrics,
)

D_SAE, N_FEATURES = 5, 4
MATCHING = torch.tensor([0, 3, 1, 3, 0])
FEATURES = torch.eye(6)[:N_FEATURES]
W_DEC = torch.tensor(
    [
        [0.9, 0.1, 0.0, 0.0, 0.2, 0.0],
        [0.1, 0.0, 0.2, 1.2, 0.0, 0.0],
        [0.3, 0.8, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.5, 0.0, 0.5],
        [0.7, 0.0, 0.1, 0.0, 0.0, 0.0],
    ]
)
PAIRS = torch.tensor([[0, 1], [2, 3], [0, 3]])
LATENTS = torch.tensor([4, 2, 1, 3])


def batches() -> list[dict[str, Tensor]]:
    """Uneven batches of sequences."""
    return [
        {
            "f": torch.randn(size, 9, D_SAE).relu(),
            "magnitudes": (torch.rand(size, 9, N_FEATURES) - 0.4).relu(),
        }
        for size in (2, 6, 3)
    ]


def rows(f: Tensor, magnitudes: Tensor) -> list[tuple[list[float], list[float]]]:
    flat = f.reshape(-1, D_SAE).tolist(), magnitudes.reshape(-1, N_FEATURES).tolist()
    return list(zip(*flat, strict=True))


def naive_counts(f: Tensor, magnitudes: Tensor) -> Tensor:
    """Both fire, latent fires, feature fires: [3, d_sae]."""
    counts = torch.zeros(3, D_SAE, dtype=torch.float64)
    for latents, features in rows(f, magnitudes):
        for j, i in enumerate(MATCHING.tolist()):
            counts[0, j] += latents[j] > 0 and features[i] > 0
            counts[1, j] += latents[j] > 0
            counts[2, j] += features[i] > 0
    return counts


def naive_precision(f: Tensor, magnitudes: Tensor) -> Tensor:
    both, latent, _ = naive_counts(f, magnitudes)
    return both / latent


def naive_recall(f: Tensor, magnitudes: Tensor) -> Tensor:
    both, _, feature = naive_counts(f, magnitudes)
    return both / feature


def naive_f1(f: Tensor, magnitudes: Tensor) -> Tensor:
    precision, recall = naive_precision(f, magnitudes), naive_recall(f, magnitudes)
    return 2 / (1 / precision + 1 / recall)


def naive_shrinkage(f: Tensor, magnitudes: Tensor) -> Tensor:
    implied, true = torch.zeros(2, D_SAE, dtype=torch.float64)
    for latents, features in rows(f, magnitudes):
        for j, i in enumerate(MATCHING.tolist()):
            if latents[j] > 0 and features[i] > 0:
                implied[j] += latents[j] * W_DEC[j, i].item()
                true[j] += features[i]
    return implied / true


def naive_absorption(f: Tensor, magnitudes: Tensor, with_child: bool) -> Tensor:
    shares = []
    for parent, child in PAIRS.tolist():
        counted = [
            latents[int(LATENTS[parent])] == 0
            for latents, features in rows(f, magnitudes)
            if features[parent] > 0 and (features[child] > 0) == with_child
        ]
        shares.append(sum(counted) / len(counted))
    return torch.tensor(shares, dtype=torch.float64)


def naive_mcc(f: Tensor, magnitudes: Tensor) -> Tensor:
    both = torch.cat([f.reshape(-1, D_SAE), magnitudes.reshape(-1, N_FEATURES)], dim=1).double()
    table = torch.corrcoef(both.T)[:D_SAE, D_SAE:].abs()
    return (
        max(
            sum((table[j, i] for i, j in enumerate(latents)), torch.zeros(()))
            for latents in itertools.permutations(range(D_SAE), N_FEATURES)
        )
        / N_FEATURES
    )


def naive_duplicates(f: Tensor, magnitudes: Tensor) -> Tensor:
    alive = [j for j in range(D_SAE) if any(latents[j] > 0 for latents, _ in rows(f, magnitudes))]
    held = [MATCHING[j].item() for j in alive]
    return torch.tensor(sum(held.count(i) > 1 for i in held) / len(held), dtype=torch.float64)


def duplicate_fraction(f: Tensor, magnitudes: Tensor) -> Tensor:
    alive = (f.reshape(-1, D_SAE) > 0).any(0)
    return duplicates(MATCHING, alive).sum().double() / alive.sum()


DETECTION: dict[str, Any] = {"matching": MATCHING}
SHRINKAGE: dict[str, Any] = {"W_dec": W_DEC, "features": FEATURES, "matching": MATCHING}
ABSORPTION: dict[str, Any] = {"pairs": PAIRS, "latents": LATENTS}


@pytest.mark.parametrize(
    ("metric", "reference", "function"),
    [
        pytest.param(
            DetectionPrecision(MATCHING),
            naive_precision,
            partial(functional.detection_precision, **DETECTION),
            id="precision",
        ),
        pytest.param(
            DetectionRecall(MATCHING),
            naive_recall,
            partial(functional.detection_recall, **DETECTION),
            id="recall",
        ),
        pytest.param(
            DetectionF1(MATCHING),
            naive_f1,
            partial(functional.detection_f1, **DETECTION),
            id="f1",
        ),
        pytest.param(
            Shrinkage(**SHRINKAGE),
            naive_shrinkage,
            partial(functional.shrinkage, **SHRINKAGE),
            id="shrinkage",
        ),
        pytest.param(
            Absorption(**ABSORPTION),
            partial(naive_absorption, with_child=True),
            partial(functional.absorption, **ABSORPTION),
            id="absorption",
        ),
        pytest.param(
            Absorption(**ABSORPTION, with_child=False),
            partial(naive_absorption, with_child=False),
            partial(functional.absorption, **ABSORPTION, with_child=False),
            id="absorption-baseline",
        ),
        pytest.param(
            DuplicateFraction(MATCHING), naive_duplicates, duplicate_fraction, id="duplicates"
        ),
        pytest.param(
            ActivationMCC(D_SAE, N_FEATURES), naive_mcc, functional.activation_mcc, id="mcc"
        ),
    ],
)
def test_passes_the_battery(
    metric: Metric,
    reference: Callable[..., Tensor],
    function: Callable[..., Tensor],
    check_metric: Callable[..., None],
) -> None:
    check_metric(metric, batches(), reference, function)


def test_a_dead_latent_is_no_duplicate_and_makes_none() -> None:
    f = torch.ones(3, D_SAE)
    f[:, 0] = 0
    metric = DuplicateFraction(MATCHING)
    metric.update(f, torch.ones(3, N_FEATURES))
    assert metric.compute().item() == 2 / 4  # latents 1 and 3 of the living four


def test_the_collection_gives_each_metric_of_the_sae_it_is_made_for() -> None:
    matching = best_features(W_DEC, FEATURES)
    assert matching.tolist() == MATCHING.tolist()
    metrics = ground_truth_metrics(W_DEC.clone().requires_grad_(), FEATURES, [(0, 1), (2, 3)])
    seen = batches()
    for batch in seen:
        metrics.update(**batch)
    values = metrics.compute()
    whole = {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}
    f, magnitudes = whole["f"], whole["magnitudes"]
    latents = torch.tensor([4, 2, 1, 1])  # the largest cosine in each column of W_DEC
    pairs = torch.tensor([[0, 1], [2, 3]])
    expected = {
        "precision": naive_precision(**whole),
        "recall": naive_recall(**whole),
        "f1": naive_f1(**whole),
        "duplicate_fraction": naive_duplicates(**whole),
        "shrinkage": naive_shrinkage(**whole),
        "absorption": functional.absorption(f, magnitudes, pairs, latents),
        "absorption_baseline": functional.absorption(f, magnitudes, pairs, latents, False),
    }
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, msg=name)


def test_without_pairs_there_is_no_absorption() -> None:
    assert "absorption" not in ground_truth_metrics(W_DEC, FEATURES)


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_widths_are_refused_with_both_sizes() -> None:
    f, magnitudes = torch.ones(2, D_SAE), torch.ones(2, N_FEATURES)
    metrics: list[Metric] = [DetectionF1(MATCHING), Shrinkage(**SHRINKAGE), ActivationMCC(5, 4)]
    for metric in metrics:
        with pytest.raises(ValueError, match=r"`f` .*d_sae=5 but got \(2, 6\)"):
            metric.update(torch.ones(2, 6), magnitudes)
    for metric in (metrics[-1], Absorption(**ABSORPTION)):
        with pytest.raises(ValueError, match=r"`magnitudes` .*n_features=4 but got \(2, 3\)"):
            metric.update(f, torch.ones(2, 3))
    with pytest.raises(ValueError, match="`n_features` to be positive but got 0"):
        ActivationMCC(5, 0)
