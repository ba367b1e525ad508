"""The compute-efficiency hit on curves of a known form."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_sae.analysis.evaluation import family
from lightning_sae.analysis.evaluation.compute import (
    EMBEDDED_CURVE,
    Curve,
    compute_hit,
    fit_curve,
    read_curve,
)


def exact(noise: float = 0.0, n: int = 8) -> Curve:
    """Compute of which the logarithm falls with the square of the loss's."""
    loss = np.linspace(2.0, 6.0, n)
    compute = np.exp(20 - 3 * np.log(loss) - 2 * np.log(loss) ** 2)
    compute *= np.exp(noise * np.random.default_rng(0).standard_normal(n))
    return Curve(float(compute[0]), compute, loss)


def test_a_curve_of_this_form_is_read_exactly() -> None:
    hit = compute_hit(exact(), 1.5)
    assert hit is not None
    logs = np.log(np.array([2.0, 3.5]))
    expected = np.exp(-3 * (logs[1] - logs[0]) - 2 * (logs[1] ** 2 - logs[0] ** 2))
    assert hit == pytest.approx((expected,) * 3, rel=1e-6)
    assert compute_hit(exact(), 0.0) == pytest.approx((1.0, 1.0, 1.0))


def test_nothing_is_said_beyond_the_points() -> None:
    assert compute_hit(exact(), 4.0) is not None
    assert compute_hit(exact(), 4.01) is None
    assert compute_hit(exact(), -0.01) is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    loss = np.linspace(2.0, 6.0, 9)
    clean = 20 - 3 * np.log(loss) - 2 * np.log(loss) ** 2
    logs = np.log(np.array([2.0, 3.0]))
    truth = -3 * (logs[1] - logs[0]) - 2 * (logs[1] ** 2 - logs[0] ** 2)
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        compute = np.exp(clean + 0.1 * rng.standard_normal(9))
        hit = compute_hit(Curve(float(compute[0]), compute, loss), 1.0)
        assert hit is not None
        held += hit.low <= np.exp(truth) <= hit.high
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert fit_curve(exact(0.1)).degrees == 5


def test_the_embedded_models_curve_comes_with_the_package() -> None:
    curve, content = read_curve(EMBEDDED_CURVE), json.loads(EMBEDDED_CURVE.read_text())
    assert curve.own_compute == curve.compute.max()
    steps = np.sort(np.unique(curve.compute))[::-1]
    factors = np.log(steps[:-1] / steps[1:]) / np.log(3)
    assert factors.sum() == pytest.approx(5.0, abs=0.02)
    assert factors == pytest.approx(factors.round(), abs=0.02)
    by_compute = [curve.loss[curve.compute == c].mean() for c in steps]
    assert by_compute == sorted(by_compute)
    fit = fit_curve(curve)
    assert content["fit"]["coefficients"] == pytest.approx(fit.coefficients.tolist(), rel=1e-6)
    assert content["fit"]["residual"] == pytest.approx(fit.residual, rel=1e-6)
    assert "lightning_sae.analysis.evaluation.family" in content["made_by"]


def test_the_kept_points_are_those_of_the_command() -> None:
    *smaller, own = json.loads(EMBEDDED_CURVE.read_text())["points"]
    made = [
        family.settings_of(size, seed, family.Settings(), own["parameters"])
        for size in family.SIZES
        for seed in range(size.seeds)
    ]
    for point, settings in zip(smaller, made, strict=True):
        assert all(point[name] == getattr(settings, name) for name in ("width", "steps", "seed"))
        assert point["compute"] == family.compute(point["parameters"], settings)
    parts = [size.part for size in family.SIZES for _ in range(size.seeds)]
    assert [own["compute"] / p["compute"] for p in smaller] == pytest.approx(parts, rel=0.01)


def rising(loss: Callable[[int], float]) -> dict[str, object]:
    """A file of models whose loss is this of their compute."""
    return {
        "own_compute": 6.0,
        "points": [{"compute": float(c), "loss": loss(c)} for c in range(1, 7)],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"points": []}, "own_compute"),
        ({"own_compute": 1.0, "points": [{"compute": 1.0}]}, "loss"),
        ({"own_compute": 1, "points": [{"compute": 1, "loss": 2}] * 9}, "1 different computes"),
        (
            {"own_compute": 9, "points": [{"compute": c, "loss": 2} for c in range(1, 7)]},
            "own_compute, 9",
        ),
        (rising(lambda c: -2.0), "has -2, where all numbers are positive"),
        (rising(lambda c: 2.0) | {"own_compute": 10**400}, "too large"),
        (rising(lambda c: 2.0) | {"own_compute": True}, "True is no number"),
        ({"own_compute": 1.0, "points": [{"compute": "1", "loss": 2.0}]}, "'1' is no number"),
        (rising(lambda c: 2.0), "a loss that falls with compute"),
        (rising(lambda c: 2.0 + c), "a loss that falls with compute"),
        (rising(lambda c: 2.0 + (c - 3) ** 2 / 9), "a loss that falls with compute"),
        ([1], "points"),
    ],
)
def test_what_is_no_curve_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_curve(path)
    with pytest.raises(ValueError, match="there is no"):
        read_curve(tmp_path / "other.json")
