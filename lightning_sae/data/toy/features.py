"""Directions, probabilities and magnitudes of the features of toy data."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softshrink

from lightning_sae.functional.geometry import random_unit_rows, unit_rows

Kind = Literal["orthogonal", "nearly_orthogonal", "random"]

PerFeature = float | Sequence[float] | dict[Literal["linear", "zipf"], tuple[float, float]]
"""A number for each feature: one for all, a list, or `linear` or `zipf` with first and last."""


def unit_directions(
    kind: Kind | Tensor, n: int, d: int, max_cosine: float, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """Unit rows of a given kind.

    Args:
        kind: `orthogonal`; `nearly_orthogonal`, with all |cos| at most `max_cosine`; `random`,
            uniform on the sphere; or the rows themselves, which are scaled to unit norm.
        n: Number of rows.
        d: Width.
        max_cosine: The bound, only for `nearly_orthogonal`.
        generator: Random number generator.

    Raises:
        ValueError: If there are no such rows, or none are found.
    """
    if isinstance(kind, Tensor):
        return _given(kind, n, d)
    if kind == "orthogonal":
        return _orthogonal(n, d, generator)
    if kind == "nearly_orthogonal":
        return repelled(random_unit_rows(n, d, generator), max_cosine)
    if kind == "random":
        return random_unit_rows(n, d, generator)
    raise ValueError(
        "Expected argument `directions` to be `orthogonal`, `nearly_orthogonal`, `random` or a "
        f"tensor but got {kind!r}."
    )


def _given(rows: Tensor, n: int, d: int) -> Tensor:
    if rows.shape != (n, d):
        raise ValueError(
            f"Expected argument `directions` to have shape [n_features, d_in] = {(n, d)} but got "
            f"{tuple(rows.shape)}: set `n_features` and `d_in` to its shape."
        )
    if not (rows.isfinite().all() and rows.any(-1).all()):
        raise ValueError("Expected argument `directions` to have finite rows that are not zero.")
    return unit_rows(rows.detach().float().cpu())


def _orthogonal(n: int, d: int, generator: torch.Generator) -> Tensor:
    if n > d:
        raise ValueError(
            f"Expected argument `n_features` to be at most d_in={d} for orthogonal directions but "
            f"got {n}: set `directions` to `nearly_orthogonal` or `random`, or `d_in` to {n}."
        )
    random = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(random).Q.T.float().contiguous()


def welch_bound(n: int, d: int) -> float:
    """Smallest possible value of the largest |cos| of `n` directions in `d` dimensions.

    Source: Welch, "Lower bounds on the maximum cross correlation of signals" (1974).

    Example:
        >>> round(welch_bound(20, 19), 6), welch_bound(19, 19)
        (0.052632, 0.0)
    """
    return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def repelled(
    w: Float[Tensor, "n d"], max_cosine: float, patience: int = 200, chunk: int = 1024
) -> Float[Tensor, "n d"]:
    r"""Move unit rows apart until no |cos| exceeds a bound.

    Gradient descent on the unit sphere with

    .. math:: \tfrac14 \sum_{i \neq j} \mathrm{ReLU}(|w_i \cdot w_j| - a)^2,

    where a is nine tenths of the bound, or the Welch bound if that is larger. The step size starts
    at 1/2 and is halved whenever the sum grows. Each step costs two matrix products of n x n x d,
    computed on `chunk` rows at a time.

    Args:
        w: Unit rows.
        max_cosine: The bound.
        patience: Steps without a decrease of the largest |cos| by a thousandth before giving up.
        chunk: Rows whose cosines with all others are computed at a time.

    Raises:
        ValueError: If the bound is impossible or is not reached.
    """
    least = welch_bound(*w.shape)
    if not least <= max_cosine < 1:
        raise ValueError(
            f"Expected argument `max_cosine` to be at least {least:.6f}, the Welch bound of "
            f"{w.shape[0]} directions in {w.shape[1]} dimensions, and below 1, but got "
            f"{max_cosine}: raise it, raise `d_in` or lower `n_features`."
        )
    aim = max(0.9 * max_cosine, 0.999 * least)
    step, smallest, before, waited = 0.5, 1.0, math.inf, 0
    while waited < patience:
        largest, excess, push = _crowding(w, aim, chunk)
        if largest <= max_cosine:
            return w
        waited = 0 if largest < 0.999 * smallest else waited + 1
        smallest = largest if waited == 0 else smallest
        step, before = (step / 2 if excess > before else step), excess
        w = unit_rows(w - step * push)
    raise ValueError(
        f"Expected argument `max_cosine` to be reachable but got {max_cosine}: the smallest bound "
        f"that was reached is {math.ceil(1e4 * smallest) / 1e4}. Raise `max_cosine` or `d_in`, or "
        "lower `n_features`."
    )


def _crowding(w: Tensor, aim: float, chunk: int) -> tuple[float, float, Tensor]:
    """The largest |cos| of two rows, the sum above, and its gradient."""
    largest, excess, push = 0.0, 0.0, torch.empty_like(w)
    for first in range(0, len(w), chunk):
        cosines = w[first : first + chunk] @ w.T
        cosines.diagonal(first).zero_()
        largest = max(largest, cosines.abs().max().item())
        beyond = softshrink(cosines, aim)
        excess += beyond.square().sum().item()
        push[first : first + chunk] = beyond @ w
    return largest, excess, push


def per_feature(name: str, value: PerFeature, n: int) -> Float[Tensor, " n"]:
    r"""One number for each of `n` features.

    Args:
        name: Name of the argument, for errors.
        value: A number for all; a list; `{"linear": (first, last)}`; or `{"zipf": (first, last)}`,
            the power of the rank i with these values at the ends,
            :math:`\text{first} \cdot i^{-\log(\text{first}/\text{last}) / \log n}`.
        n: Number of features.

    Raises:
        ValueError: If a list has another length, or a key or number is wrong.

    Example:
        >>> per_feature("magnitudes", {"linear": (20.0, 1.0)}, 3)
        tensor([20.0000, 10.5000,  1.0000])
        >>> per_feature("probabilities", {"zipf": (0.4, 0.1)}, 4)
        tensor([0.4000, 0.2000, 0.1333, 0.1000])
    """
    if isinstance(value, dict):
        return _between(name, value, n)
    if not isinstance(value, Sequence):
        return torch.full((n,), float(value))
    if len(value) != n:
        raise ValueError(
            f"Expected argument `{name}` to have {n} numbers, one for each feature "
            f"(`n_features`), but got {len(value)}."
        )
    return torch.tensor(value, dtype=torch.float32)


def _between(name: str, value: dict, n: int) -> Tensor:
    shape, ends = next(iter(value.items()), (None, None))
    if len(value) != 1 or shape not in ("linear", "zipf") or ends is None or len(ends) != 2:
        raise ValueError(
            f"Expected argument `{name}` to be a number, a list, or `linear` or `zipf` with the "
            f"first feature's number and the last one's, but got {value}: write "
            "`{linear: [0.1, 0.3]}`."
        )
    first, last = ends
    if shape == "linear":
        return torch.linspace(first, last, n)
    if not (first > 0 and last > 0):
        raise ValueError(
            f"Expected argument `{name}` to have positive ends for `zipf` but got {value}."
        )
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    exponent = math.log(first / last) / math.log(n) if n > 1 else 0.0
    return (first * ranks**-exponent).float()


def constant(bias: float | Sequence[float], d_in: int, generator: torch.Generator) -> Tensor:
    """The given vector, or one of random direction and the given norm."""
    if not isinstance(bias, Sequence):
        return bias * random_unit_rows(1, d_in, generator)[0]
    if len(bias) != d_in:
        raise ValueError(
            f"Expected argument `bias` to be a norm or d_in={d_in} numbers but got {len(bias)}."
        )
    return torch.tensor(bias, dtype=torch.float32)
