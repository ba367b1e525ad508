from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sae import functional
from lightning_sae.metrics import L0, DeadFraction, FeatureFrequency, FrequencyBelow

D_SAE = 7


def batches() -> list[dict[str, Tensor]]:
    """Uneven batches of sequences; latent 0 never fires, latent 1 always, the others vary."""
    made = []
    for size in (1, 4, 2):
        f = torch.randn(size, 3, D_SAE).relu()
        f[..., 0], f[..., 1] = 0, 1
        made.append({"f": f})
    return made


def naive_frequency(f: Tensor) -> Tensor:
    rows = f.reshape(-1, D_SAE).tolist()
    counts = [sum(1 for row in rows if row[j] != 0) for j in range(D_SAE)]
    return torch.tensor([count / len(rows) for count in counts], dtype=torch.float64)


def naive_l0(f: Tensor) -> Tensor:
    rows = f.reshape(-1, D_SAE).tolist()
    active = sum(sum(1 for value in row if value != 0) for row in rows)
    return torch.tensor(active / len(rows), dtype=torch.float64)


def naive_dead_fraction(f: Tensor) -> Tensor:
    dead = sum(1 for p in naive_frequency(f).tolist() if p == 0)
    return torch.tensor(dead / D_SAE, dtype=torch.float64)


def naive_frequency_below_half(f: Tensor) -> Tensor:
    below = sum(1 for p in naive_frequency(f).tolist() if p < 0.5)
    return torch.tensor(below / D_SAE, dtype=torch.float64)


def frequency_below_half(f: Tensor) -> Tensor:
    return functional.frequency_below(f, threshold=0.5)


@pytest.mark.parametrize(
    ("metric", "reference", "function"),
    [
        pytest.param(L0(), naive_l0, functional.l0, id="l0"),
        pytest.param(
            FeatureFrequency(D_SAE), naive_frequency, functional.feature_frequency, id="frequency"
        ),
        pytest.param(DeadFraction(D_SAE), naive_dead_fraction, functional.dead_fraction, id="dead"),
        pytest.param(
            FrequencyBelow(D_SAE, threshold=0.5),
            naive_frequency_below_half,
            frequency_below_half,
            id="below",
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


def test_frequency_at_the_threshold_is_not_below_it() -> None:
    metric = FrequencyBelow(d_sae=3, threshold=1e-5)
    quiet = torch.zeros(100_000 - 2, 3)
    metric.update(quiet)
    metric.update(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))  # 2, 0 and 1 in 100 000
    assert metric.compute().item() == pytest.approx(1 / 3)


def test_bfloat16_latents_are_counted_exactly() -> None:
    metric = FeatureFrequency(d_sae=2)
    f = torch.ones(1000, 2, dtype=torch.bfloat16)  # bfloat16 cannot count past 256
    f[0, 1] = 0
    metric.update(f)
    assert metric.compute().tolist() == [1.0, 0.999]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("metric", [FeatureFrequency, DeadFraction, FrequencyBelow])
def test_wrong_width_is_refused_with_both_sizes(metric: type[FeatureFrequency]) -> None:
    message = r"`f` to have shape \[\.\.\., d_sae\] with d_sae=5 but got \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        metric(d_sae=5).update(torch.ones(2, 4))


@pytest.mark.parametrize("metric", [FeatureFrequency, DeadFraction, FrequencyBelow])
def test_non_positive_width_is_refused(metric: type[FeatureFrequency]) -> None:
    with pytest.raises(ValueError, match=r"`d_sae` to be positive but got -1"):
        metric(d_sae=-1)


@pytest.mark.parametrize("threshold", [0.0, -1e-5, 1.5])
def test_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    message = rf"`threshold` to be in \(0, 1\] but got {threshold}"
    with pytest.raises(ValueError, match=message):
        FrequencyBelow(d_sae=5, threshold=threshold)
