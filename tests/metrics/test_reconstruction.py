import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sae import functional
from lightning_sae.metrics import (
    FVU,
    MSE,
    CosineSimilarity,
    ExplainedVariance,
    L2Ratio,
    RelativeReconstructionBias,
)

D_IN = 5


def batches() -> list[dict[str, Tensor]]:
    """Uneven batches of sequences; tokens with a zero activation or reconstruction among them."""
    made = []
    for size in (1, 4, 2):
        x = 3 + torch.randn(size, 3, D_IN)
        made.append({"x": x, "x_hat": 0.8 * x + 0.3 * torch.randn_like(x)})
    made[1]["x"][0, 0] = 0
    made[1]["x_hat"][1, 2] = 0
    return made


def tokens(x: Tensor, x_hat: Tensor) -> list[tuple[list[float], list[float]]]:
    return list(zip(x.reshape(-1, D_IN).tolist(), x_hat.reshape(-1, D_IN).tolist(), strict=True))


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def squared_distance(a: list[float], b: list[float]) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def naive_mse(x: Tensor, x_hat: Tensor) -> Tensor:
    errors = [squared_distance(a, b) for a, b in tokens(x, x_hat)]
    return torch.tensor(math.fsum(errors) / len(errors), dtype=torch.float64)


def naive_fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    pairs = tokens(x, x_hat)
    mean = [math.fsum(a[i] for a, _ in pairs) / len(pairs) for i in range(D_IN)]
    unexplained = math.fsum(squared_distance(a, b) for a, b in pairs)
    variance = math.fsum(squared_distance(a, mean) for a, _ in pairs)
    return torch.tensor(unexplained / variance, dtype=torch.float64)


def naive_explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    return 1 - naive_fvu(x, x_hat)


def naive_l2_ratio(x: Tensor, x_hat: Tensor) -> Tensor:
    ratios = [math.sqrt(dot(b, b) / dot(a, a)) for a, b in tokens(x, x_hat) if any(a)]
    return torch.tensor(math.fsum(ratios) / len(ratios), dtype=torch.float64)


def naive_bias(x: Tensor, x_hat: Tensor) -> Tensor:
    # The least-squares factor s = 1/gamma of x ~ s * x_hat, by a general solver.
    design, target = x_hat.double().reshape(-1, 1), x.double().reshape(-1, 1)
    return 1 / torch.linalg.lstsq(design, target).solution.squeeze()


def naive_cosine(x: Tensor, x_hat: Tensor) -> Tensor:
    cosines = [
        dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) if any(b) else 0.0
        for a, b in tokens(x, x_hat)
        if any(a)
    ]
    return torch.tensor(math.fsum(cosines) / len(cosines), dtype=torch.float64)


ALL = [
    pytest.param(MSE(), naive_mse, functional.mse, id="mse"),
    pytest.param(FVU(D_IN), naive_fvu, functional.fvu, id="fvu"),
    pytest.param(
        ExplainedVariance(D_IN), naive_explained_variance, functional.explained_variance, id="ev"
    ),
    pytest.param(L2Ratio(), naive_l2_ratio, functional.l2_ratio, id="l2_ratio"),
    pytest.param(
        RelativeReconstructionBias(),
        naive_bias,
        functional.relative_reconstruction_bias,
        id="relative_reconstruction_bias",
    ),
    pytest.param(CosineSimilarity(), naive_cosine, functional.cosine_similarity, id="cosine"),
]


@pytest.mark.parametrize(("metric", "reference", "function"), ALL)
def test_passes_the_battery(
    metric: Metric,
    reference: Callable[..., Tensor],
    function: Callable[..., Tensor],
    check_metric: Callable[..., None],
) -> None:
    check_metric(metric, batches(), reference, function)


@pytest.mark.parametrize(("metric", "reference", "function"), ALL)
def test_bfloat16_inputs_lose_nothing_in_the_sums(
    metric: Metric, reference: Callable[..., Tensor], function: Callable[..., Tensor]
) -> None:
    halves = [{k: v.bfloat16() for k, v in batch.items()} for batch in batches()]
    whole = {k: torch.cat([batch[k] for batch in halves]) for k in ("x", "x_hat")}
    metric = metric.clone()
    for batch in halves:
        metric.update(**batch)
    expected = reference(**whole)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(function(**whole), expected, rtol=1e-9, atol=0)


def test_long_sums_keep_small_increments() -> None:
    # In float32, 2**24 + 1 is 2**24.
    metric = MSE()
    metric.update(torch.tensor([[4096.0]]), torch.zeros(1, 1))
    for _ in range(3):
        metric.update(torch.ones(1, 1), torch.zeros(1, 1))
    assert metric.compute().item() == (2**24 + 3) / 4


def test_fvu_uses_the_mean_of_all_tokens_not_of_a_batch() -> None:
    metric = FVU(d_in=1)
    for value in (1.0, -1.0):  # within each batch x does not vary
        metric.update(torch.full((4, 1), value), torch.zeros(4, 1))
    assert metric.compute().item() == 1.0


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_width_is_refused_with_both_sizes() -> None:
    message = r"`x` to have shape \[\.\.\., d_in\] with d_in=5 but got \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        FVU(d_in=5).update(torch.ones(2, 4), torch.ones(2, 4))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("metric", [MSE(), FVU(4), L2Ratio(), CosineSimilarity()])
def test_shape_mismatch_is_refused_with_both_shapes(metric: Metric) -> None:
    with pytest.raises(ValueError, match=r"but got \(2, 4\) and \(3, 4\)"):
        metric.update(torch.ones(2, 4), torch.ones(3, 4))


@pytest.mark.parametrize("metric", [FVU, ExplainedVariance])
def test_non_positive_width_is_refused(metric: type[FVU]) -> None:
    with pytest.raises(ValueError, match=r"`d_in` to be positive but got 0"):
        metric(d_in=0)


def test_state_reset_in_inference_mode_can_be_updated_outside() -> None:
    metric = MSE()
    x = torch.ones(2, 3)
    metric.update(x, 0 * x)
    with torch.inference_mode():
        metric.reset()
    metric.update(x, 0 * x)
    assert metric.compute().item() == 3.0


def test_set_dtype_is_obeyed() -> None:
    metric = MSE().set_dtype(torch.float32)
    metric.update(torch.ones(1, 1), torch.zeros(1, 1))
    assert metric.squared_error.dtype == torch.float32
