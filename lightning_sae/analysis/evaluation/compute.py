r"""Compute share: the training compute of a model with the same loss as the spliced one.

A language model with a spliced SAE has the loss of a smaller model. Gao et al., *Scaling
and evaluating sparse autoencoders* (2024, section 4.1), and the discussion of Rajamanoharan et al.,
*Improving dictionary learning with gated sparse autoencoders* (LessWrong, 2024), estimate the
training compute of that smaller model. To models of one recipe, each trained with compute
:math:`C_i` to a loss of :math:`L_i`, a curve is fitted by least squares,

.. math:: \ln C = \beta_0 + \beta_1 \ln L + \beta_2 \ln^2 L = \beta \cdot \varphi(L),

and read at the loss :math:`L_0` of the model itself and at :math:`L_0` plus what splicing adds:

.. math:: \ln \frac{C}{C_0} = \beta \cdot d, \quad d = \varphi(L_0 + \Delta) - \varphi(L_0), \quad
    s^2 = d^\top \mathrm{Cov}(\beta)\, d.

The interval is :math:`\beta \cdot d \pm t_{.975} s`, with the quantile of n - 3 degrees of freedom.
Several models with equal compute count as one, with their mean loss. The interval covers the error
of the fit, not the difference between recipes. Losses outside the range of the points give no
estimate.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from lightning_sae.files import read_json

EMBEDDED_CURVE = Path(__file__).parent / "embedded_curve.json"
"""Points of the embedded model, by `python -m lightning_sae.analysis.evaluation.family`."""
FORM = (
    '{"own_compute": C, "points": [{"compute": C, "loss": L}, ...]}, five points or more, with '
    "`own_compute`, that of the model itself, one of them"
)


class Curve(NamedTuple):
    """Losses of models by their training compute.

    Attributes:
        own_compute: Compute of the model whose SAEs are evaluated, in the unit of `compute`.
        compute: Training compute of each point.
        loss: Loss of each point, in nats per token.
    """

    own_compute: float
    compute: Any
    loss: Any


class Hit(NamedTuple):
    """Share of the model's compute with which a model reaches the loss of the spliced one.

    Attributes:
        share: The estimate.
        low: Lower end of the 95 % confidence interval.
        high: Upper end of the interval.
    """

    share: float
    low: float
    high: float


class Fit(NamedTuple):
    """Coefficients of the curve, their covariance, and the residual standard deviation of ln C."""

    coefficients: Any
    covariance: Any
    residual: float
    degrees: int


def read_curve(path: str | Path) -> Curve:
    """Read a curve from JSON; entries other than those in `FORM` are ignored.

    Raises:
        ValueError: If the file does not have this form, or has too few points.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Expected argument `curve` to be a file but there is no {path}: {FORM}.")
    content = read_json(path)
    try:
        own = _number(content["own_compute"])
        points = [(_number(p["compute"]), _number(p["loss"])) for p in content["points"]]
        compute, loss = np.array(points, dtype=float).reshape(-1, 2).T
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Expected argument `curve` to hold {FORM}, but {path} does not: {error!r}."
        ) from error
    wrong = [x for x in (own, *compute, *loss) if not 0 < x < np.inf]
    problem = None
    if wrong:
        problem = f"{wrong[0]:g}, where all numbers are positive and finite"
    elif len(set(compute)) < 5:
        problem = f"{len(set(compute))} different computes"
    elif own not in compute:
        problem = f"no point with own_compute, {own:g}"
    if problem is not None:
        raise ValueError(f"Expected argument `curve` to hold {FORM}, but {path} has {problem}.")
    curve = Curve(own, compute, loss)
    _require_falling(curve, path)
    return curve


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _require_falling(curve: Curve, path: Path) -> None:
    """Raise a ValueError unless a smaller loss takes more compute, on the fit at each point."""
    by_compute = [curve.loss[curve.compute == c].mean() for c in np.unique(curve.compute)]
    features = _features(np.unique(by_compute))
    determined = np.linalg.matrix_rank(features) == features.shape[1]
    if not determined or (np.diff(features @ fit_curve(curve).coefficients) >= 0).any():
        raise ValueError(
            f"Expected argument `curve` to have a loss that falls with compute but a curve fitted "
            f"to the points in {path} does not: give models of one recipe."
        )


def curve_of(model: str | None) -> Curve | None:
    """The package's curve for a model, if there is one."""
    return read_curve(EMBEDDED_CURVE) if model == "embedded" else None


def fit_curve(curve: Curve) -> Fit:
    """Fit the curve by least squares, to the mean loss of the models of each compute.

    Models with equal compute and different seeds carry no information on the shape of the curve.
    """
    computes = np.unique(curve.compute)
    design = _features(np.array([curve.loss[curve.compute == c].mean() for c in computes]))
    y = np.log(computes)
    coefficients, _, _, _ = np.linalg.lstsq(design, y, rcond=None)
    degrees = len(y) - design.shape[1]
    variance = float(((y - design @ coefficients) ** 2).sum()) / degrees
    covariance = variance * np.linalg.inv(design.T @ design)
    return Fit(coefficients, covariance, float(np.sqrt(variance)), degrees)


def compute_hit(curve: Curve, added: float) -> Hit | None:
    """Read the curve at the model's own loss plus `added`.

    Args:
        curve: The points.
        added: Nats per token that splicing adds; 0 gives a share of exactly 1.

    Returns:
        None if the loss lies outside the range of the points.
    """
    own = float(curve.loss[curve.compute == curve.own_compute].mean())
    if not curve.loss.min() <= own + added <= curve.loss.max():
        return None
    fit = fit_curve(curve)
    d = _features(np.array([own + added]))[0] - _features(np.array([own]))[0]
    mean = float(fit.coefficients @ d)
    half = float(t.ppf(0.975, fit.degrees) * np.sqrt(max(d @ fit.covariance @ d, 0.0)))
    return Hit(*(float(np.exp(mean + off)) for off in (0.0, -half, half)))


def _features(loss: Any) -> Any:
    logs = np.log(loss)
    return np.stack([np.ones_like(logs), logs, logs**2], axis=1)
