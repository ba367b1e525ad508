import pickle

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_sae import functional
from lightning_sae.metrics import held_out_metrics

D_IN, D_SAE = 4, 6


def batches() -> list[dict[str, Tensor]]:
    made = []
    for size in (3, 5, 1):
        x = torch.randn(size, D_IN)
        made.append(
            {"x": x, "x_hat": x + torch.randn_like(x), "f": torch.randn(size, D_SAE).relu()}
        )
    return made


def expected(x: Tensor, x_hat: Tensor, f: Tensor) -> dict[str, Tensor]:
    return {
        "l0": functional.l0(f),
        "mse": functional.mse(x, x_hat),
        "fvu": functional.fvu(x, x_hat),
        "explained_variance": functional.explained_variance(x, x_hat),
        "l2_ratio": functional.l2_ratio(x, x_hat),
        "relative_reconstruction_bias": functional.relative_reconstruction_bias(x, x_hat),
        "cosine_similarity": functional.cosine_similarity(x, x_hat),
        "dead_fraction": functional.dead_fraction(f),
        "frequency_below_1e-5": functional.frequency_below(f, 1e-5),
        "frequency_below_1e-4": functional.frequency_below(f, 1e-4),
        "frequency": functional.feature_frequency(f),
    }


def run(metrics: MetricCollection, made: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    for batch in made:
        metrics.update(**batch)
    return metrics.compute()


def assert_is_expected(values: dict[str, Tensor], made: list[dict[str, Tensor]]) -> None:
    whole = {name: torch.cat([batch[name] for batch in made]) for name in made[0]}
    torch.testing.assert_close(values, expected(**whole), rtol=1e-9, atol=0)


def test_each_metric_takes_its_own_arguments() -> None:
    made = batches()
    assert_is_expected(run(held_out_metrics(D_IN, D_SAE), made), made)


def test_only_metrics_of_the_same_sums_share_a_state() -> None:
    metrics = held_out_metrics(D_IN, D_SAE)
    run(metrics, batches())
    groups = {frozenset(group) for group in metrics.compute_groups.values() if len(group) > 1}
    assert groups == {
        frozenset({"fvu", "explained_variance"}),
        frozenset({"dead_fraction", "frequency_below_1e-5", "frequency_below_1e-4", "frequency"}),
    }


def test_a_degenerate_first_batch_merges_no_different_metrics() -> None:
    # Perfect reconstruction by latents that are 0 or 1: many sums are equal at first.
    x = torch.eye(D_IN)
    ordinary = batches()
    made = [{"x": x, "x_hat": x, "f": torch.eye(D_IN, D_SAE)}, *ordinary]
    assert_is_expected(run(held_out_metrics(D_IN, D_SAE), made), made)
    made = [{"x": 0 * x, "x_hat": 0 * x, "f": torch.zeros(D_IN, D_SAE)}, *ordinary]
    assert_is_expected(run(held_out_metrics(D_IN, D_SAE), made), made)


def test_state_names_are_a_metric_s_own() -> None:
    # What torchmetrics goes by: equal names of states and equal values are one metric.
    def key(metric: Metric) -> tuple[frozenset[str], object]:
        return frozenset(metric.metric_state), type(metric).update

    keys = {key(metric) for metric in held_out_metrics(D_IN, D_SAE).values()}
    assert len({names for names, _ in keys}) == len(keys)


def test_reset_forgets() -> None:
    metrics, made = held_out_metrics(D_IN, D_SAE), batches()
    run(metrics, [{name: 2 * t for name, t in batch.items()} for batch in made])
    metrics.reset()
    assert_is_expected(run(metrics, made), made)


def test_pickle_round_trip_keeps_the_state() -> None:
    metrics, made = held_out_metrics(D_IN, D_SAE), batches()
    run(metrics, made[:1])
    metrics = pickle.loads(pickle.dumps(metrics))
    assert_is_expected(run(metrics, made[1:]), made)
