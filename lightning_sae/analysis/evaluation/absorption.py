r"""Absorption and splitting: does the latent of a property stay silent where it should fire?

Chanin et al., *A is for absorption* (2024), with the definitions of SAEBench (Karvonen et al.
2025, "feature absorption"). A probe on the activation finds the direction :math:`\hat p` of a
property, such as a first letter. The property's own latents are those of the smallest k-sparse
probe whose F1 rises by at most .03 with one more latent; more than one own latent is splitting. On
each token of the test half that has the property by label and by probe, with :math:`a = (x -
b_{dec}) \cdot \hat p` and :math:`c_j = f_j\, W_j \cdot \hat p`:

*Full absorption*: the property's own latents are silent, and the latent of the largest
:math:`c_j` has a cosine of at least .025 with :math:`\hat p` and :math:`c_j \ge .4\, a`.

*Absorption fraction*: with :math:`m` the sum of :math:`c_j` over the own latents and :math:`s` that
over the three other latents of largest :math:`c_j > 0` whose cosine is at least .1, it is 0 if
:math:`m \ge a` or :math:`s < .4\, a`; 1 if :math:`m \le 0`; else :math:`s' / (s' + m)` with
:math:`s' = \min(s, a - m)`.

Both are means over these tokens. Differences from SAEBench: tokens come from running text, each at
most a few times, not from spelling prompts; the halves consist of different documents; and `b_dec`,
which belongs to no latent, is subtracted from the activation.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor

from lightning_sae.analysis.evaluation.probing import dense

LEAST_F1 = 0.6  # F1 that the probe on the activation needs for the property to count as present
FEWEST = 20  # tokens that have the property by label and by probe
JUMP = 0.03
MOST_LATENTS = 10
L1 = 0.01  # weight of the L1 penalty that selects latents, relative to a mean over tokens
SHARE = 0.4  # minimum share of the projection on the probe for absorbing latents
COSINE_FULL, COSINE_PART = 0.025, 0.1
ABSORBERS = 3


class Probe(NamedTuple):
    """A linear probe on activations.

    Attributes:
        direction: Unit vector.
        f1: F1 on the test half.
        found: Indices of rows of the test half that have the property by label and by probe.
    """

    direction: Float[Tensor, " d_in"]
    f1: float
    found: Int[Tensor, " found"]


class Rows(NamedTuple):
    """Row indices of labelled tokens, in two halves."""

    train: Int[Tensor, " train"]
    test: Int[Tensor, " test"]
    labels: Int[Tensor, " n"]  # of all rows


def natural_rows(
    labels: Int[Tensor, " n"],
    tested: Bool[Tensor, " n"],
    ids: Int[Tensor, " n"],
    per_type: int | None,
    generator: torch.Generator,
    most: tuple[int, int] = (6000, 3000),
) -> Rows:
    """Rows of both halves, in the proportion in which they occur.

    Args:
        labels: 1, 0, or -1 for rows that are left out.
        tested: Mask of the rows in the test half.
        ids: Token ids.
        per_type: Maximum occurrences of a token in a half; None keeps all.
        generator: Draws the rows.
        most: Maximum number of rows of the halves.
    """
    halves = []
    for mask, n in zip((~tested, tested), most, strict=True):
        rows = (mask & (labels >= 0)).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        if per_type is not None:
            rows = rows[_occurrence(ids[rows]) < per_type]
        halves.append(rows[:n])
    return Rows(halves[0], halves[1], labels)


def _occurrence(ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many times each number occurred before.

    Example:
        >>> _occurrence(torch.tensor([5, 3, 5, 5, 3]))
        tensor([0, 0, 1, 2, 1])
    """
    order = ids.argsort(stable=True)
    starts = torch.searchsorted(ids[order], ids[order])
    counts = torch.empty_like(ids)
    counts[order] = torch.arange(len(ids)) - starts
    return counts


def train_probe(x: Float[Tensor, "n d_in"], rows: Rows) -> Probe:
    """A logistic regression on activations with equal class weights.

    Activations are centred and divided by one number for all coordinates, so a coordinate with
    little variance contributes little to the direction.
    """
    train, test = x[rows.train].numpy(), x[rows.test].numpy()
    mean = train.mean(0)
    scale = (train - mean).std() + 1e-12
    model = LogisticRegression(max_iter=2000, class_weight="balanced")
    model.fit((train - mean) / scale, rows.labels[rows.train].numpy())
    truth = rows.labels[rows.test].numpy()
    said = model.predict((test - mean) / scale)
    direction = torch.from_numpy(model.coef_[0]).to(x)
    found = rows.test[torch.from_numpy((truth == 1) & (said == 1))]
    return Probe(direction / direction.norm(), float(f1_score(truth, said)), found)


def own_latents(latents: Any, rows: Rows) -> tuple[list[int], float]:
    """The latents of a property, by k-sparse probes of growing k, and the F1 of the last.

    An L1-penalised logistic regression on all latents ranks them by weight; latents are added while
    F1 on the test half rises by more than .03. There are none if no latent has a positive weight,
    as when all are dead: then the order would be arbitrary.

    Args:
        latents: Sparse matrix [n, d_sae].
        rows: Tokens and labels.
    """
    train, test = latents[rows.train.numpy()], latents[rows.test.numpy()]
    y, truth = rows.labels[rows.train].numpy(), rows.labels[rows.test].numpy()
    unit = train.data.mean() if train.nnz else 1.0  # makes the penalty independent of the unit
    weights = l1_probe(train / unit, y)[0]
    if not weights.max() > 0:
        return [], 0.0
    ranked = np.argsort(-weights, kind="stable")
    best = -1.0
    own: list[int] = []
    for k in range(1, MOST_LATENTS + 1):
        columns = ranked[:k]
        model = LogisticRegression(max_iter=2000, class_weight="balanced")
        model.fit(dense(train[:, columns]) / unit, y)
        f1 = float(f1_score(truth, model.predict(dense(test[:, columns]) / unit)))
        if f1 <= best + JUMP and own:
            break
        best, own = f1, columns.tolist()
    return own, best


def l1_probe(rows: Any, labels: Any, weight: float = L1, steps: int = 400) -> tuple[Any, float]:
    r"""A logistic regression with an L1 penalty on its weights :math:`w` and none on :math:`b`.

    .. math:: \min_{w, b} \frac{1}{n} \sum_i s_i \ln\left(1 + e^{-y_i (w \cdot x_i + b)}\right)
        + \lambda \|w\|_1

    :math:`s_i` gives both classes equal weight. Solved by FISTA (Beck and Teboulle 2009), which
    needs only products with the sparse matrix.

    Args:
        rows: Matrix [n, d], sparse or not.
        labels: 0 or 1, [n].
        weight: :math:`\lambda`.
        steps: Number of steps.

    Returns:
        `w` [d] and `b`.
    """
    n, d = rows.shape
    share = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean())) / n
    # A constant column for `b`, of the same norm as the others, so that one step size fits all.
    unit = float(np.sqrt(_square_norm(rows, share)))
    now, ahead, momentum = np.zeros(d + 1), np.zeros(d + 1), 1.0
    step = 4 / (2 * unit**2) if unit else 1.0
    for _ in range(steps):
        logits = np.asarray(rows @ ahead[:d]).ravel() + unit * ahead[d]
        slope = share * (expit(logits) - labels)
        gradient = np.append(np.asarray(rows.T @ slope).ravel(), unit * slope.sum())
        following = ahead - step * gradient
        shrunk = np.abs(following[:d]) - step * weight
        following[:d] = np.sign(following[:d]) * np.maximum(shrunk, 0)
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / grown * (following - now)
        now, momentum = following, grown
    return now[:d], float(unit * now[d])


def _square_norm(rows: Any, share: Any) -> float:
    """Largest eigenvalue of the weighted second moments of rows, by power iteration."""
    vector, size = np.ones(rows.shape[1]), 0.0
    for _ in range(30):
        vector = vector / max(float(np.linalg.norm(vector)), 1e-30)
        vector = np.asarray(rows.T @ (share * np.asarray(rows @ vector).ravel())).ravel()
        size = float(np.linalg.norm(vector))
    return 1.1 * size  # power iteration underestimates: add a margin


def absorbed(
    projection: Float[Tensor, " n"],
    f: Float[Tensor, "n d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    direction: Float[Tensor, " d_in"],
    own: list[int],
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Absorption fraction and full absorption of each of some tokens.

    Args:
        projection: Projections of their activations on the probe's direction, [n].
        f: Their latents, [n, d_sae].
        W_dec: Decoder rows.
        direction: The probe's direction, of norm 1.
        own: Indices of the property's own latents.
    """
    along = W_dec @ direction
    cosine = along / W_dec.norm(dim=-1).clamp_min(1e-12)
    share = f * along
    mine = share[:, own].sum(1)

    others = share.clone()
    others[:, own] = 0.0
    others[:, cosine < COSINE_PART] = 0.0
    absorbing = others.clamp_min(0).topk(min(ABSORBERS, others.shape[1]), dim=1).values.sum(1)
    taken = torch.minimum(absorbing, projection - mine)
    fraction = (taken / (taken + mine)).clamp(0, 1)
    fraction = torch.where(mine <= 0, torch.ones_like(fraction), fraction)
    none = (mine >= projection) | (absorbing / projection < SHARE)
    fraction = torch.where(none, torch.zeros_like(fraction), fraction)

    top, which = share.max(dim=1)
    silent = (f[:, own] == 0).all(1)
    full = silent & (cosine[which] >= COSINE_FULL) & (projection > 0)
    return fraction, full & (top / projection >= SHARE)
