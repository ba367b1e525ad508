"""One battery of checks that every metric passes: the fixture `check_metric`."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

Batch = dict[str, Tensor]


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.double(), rtol=1e-9, atol=0, equal_nan=True)


def _whole(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _updated(metric: Metric, batches: list[Batch]) -> Metric:
    metric = copy.deepcopy(metric)
    for batch in batches:
        metric.update(**batch)
    return metric


def _states(metric: Metric) -> dict[str, Tensor]:
    return {name: s for name, s in metric.metric_state.items() if isinstance(s, Tensor)}


def _check_ranks(metric: Metric, batches: list[Batch], expected: Tensor) -> None:
    """Two ranks, one of which saw fewer batches, agree with one that saw everything."""
    first, second = _updated(metric, batches[:1]), _updated(metric, batches[1:])
    merged = copy.deepcopy(first)
    merged.merge_state(second)
    _close(merged.compute(), expected)

    others = iter(_states(second).values())
    first.dist_sync_fn = lambda state, group: [state, next(others)]
    first.distributed_available_fn = lambda: True
    _close(first.compute(), expected)


def _check_states(metric: Metric) -> None:
    """Sums stay float64 and counts int64, with all digits, whatever happens to the module."""
    before = {name: state.clone() for name, state in _states(metric).items()}
    assert before
    nn.ModuleList([metric]).to(torch.bfloat16).half()
    for name, state in _states(metric).items():
        assert state.dtype in (torch.float64, torch.int64), name
        assert torch.equal(state, before[name]), name


def _check(
    metric: Metric,
    batches: list[Batch],
    reference: Callable[..., Tensor],
    function: Callable[..., Tensor],
) -> None:
    whole, empty = _whole(batches), {name: t[:0] for name, t in batches[0].items()}
    expected = reference(**whole)
    assert not expected.isnan().any()
    assert len({len(next(iter(batch.values()))) for batch in batches}) > 1, "use uneven batches"
    _close(function(**whole), expected)
    _close(_updated(metric, [whole]).compute(), expected)
    _close(_updated(metric, [*batches, empty]).compute(), expected)
    _check_ranks(metric, batches, expected)

    seen = _updated(metric, batches[1:])
    _close(seen(**batches[0]), reference(**batches[0]))  # forward: this batch's value
    _check_states(seen)
    seen = pickle.loads(pickle.dumps(seen))
    _close(seen.compute(), expected)
    seen.reset()
    _close(_updated(seen, batches).compute(), expected)
    assert function(**empty).isnan().all(), "no tokens, no number"

    inputs = {name: t.clone().requires_grad_() for name, t in whole.items()}
    assert function(**inputs).requires_grad == metric.is_differentiable


@pytest.fixture
def check_metric() -> Callable[..., None]:
    """The battery: `check_metric(metric, batches, reference, function)`.

    `batches` are uneven keyword arguments of `update`, `reference` is an independent naive
    computation over all tokens, `function` the functional twin.
    """
    return _check


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What users see: annotations are not executed, our own checks speak."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
