"""Absorption and splitting by their definitions, word for word, and on made-up latents."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from lightning_sae.analysis.evaluation.absorption import (
    Rows,
    absorbed,
    l1_probe,
    natural_rows,
    own_latents,
    train_probe,
)


def naive(a: float, f: list, cosine: list, norm: list, own: list) -> tuple[float, bool]:
    """The two definitions of SAEBench for one token, with decoder rows of any norm."""
    share = [f[j] * cosine[j] * norm[j] for j in range(len(f))]
    mine = sum(share[j] for j in own)
    able = [share[j] for j in range(len(f)) if j not in own and cosine[j] >= 0.1 and share[j] > 0]
    others = sum(sorted(able, reverse=True)[:3])
    if mine >= a or others / a < 0.4:
        fraction = 0.0
    elif mine <= 0:
        fraction = 1.0
    else:
        taken = min(others, a - mine)
        fraction = taken / (taken + mine)
    top = max(range(len(f)), key=lambda j: share[j])
    silent = all(f[j] == 0 for j in own)
    full = silent and cosine[top] >= 0.025 and a > 0 and share[top] / a >= 0.4
    return fraction, full


def test_absorption_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    W_dec, direction = torch.randn(12, 6), torch.randn(6)
    direction = direction / direction.norm()
    f = torch.rand(400, 12) * (torch.rand(400, 12) < 0.3)
    projection = torch.randn(400) + 0.8
    cosine = torch.cosine_similarity(W_dec, direction.expand_as(W_dec), dim=-1)
    own = cosine.argsort(descending=True)[1:3].tolist()
    fraction, full = absorbed(projection, f, W_dec, direction, own)
    expected = [
        naive(float(a), row.tolist(), cosine.tolist(), W_dec.norm(dim=-1).tolist(), own)
        for a, row in zip(projection, f, strict=True)
    ]
    assert fraction.tolist() == pytest.approx([e[0] for e in expected], abs=1e-6)
    assert full.tolist() == [e[1] for e in expected]
    assert 0.05 < float(full.float().mean()) < 0.95
    assert ((fraction > 0) & (fraction < 1)).any()


@pytest.mark.parametrize("sparse", [False, True])
def test_an_l1_probe_meets_the_conditions_of_its_optimum(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((200, 8)) * (rng.random((200, 8)) < 0.5)
    labels = (rows[:, 2] + 0.3 * rng.standard_normal(200) > 0.4).astype(int)
    matrix = csr_matrix(rows) if sparse else rows
    weights, intercept = l1_probe(matrix, labels, 0.02, 3000)
    share = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (labels == 0).sum())
    slope = share * (1 / (1 + np.exp(-(rows @ weights + intercept))) - labels)
    gradient = rows.T @ slope
    active = weights != 0
    assert 0 < active.sum() < 8
    assert weights[2] == weights.max()
    np.testing.assert_allclose(gradient[active], -0.02 * np.sign(weights[active]), atol=1e-5)
    assert (np.abs(gradient[~active]) <= 0.02 + 1e-6).all()
    assert slope.sum() == pytest.approx(0, abs=1e-5)


def rows_of(labels: torch.Tensor) -> Rows:
    numbers = torch.arange(len(labels))
    return Rows(numbers[numbers % 2 == 0], numbers[numbers % 2 == 1], labels)


@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_property_split_over_latents_has_them_all(n_parts: int) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(900) < 0.3).astype(int)
    part = rng.integers(0, n_parts, 900)
    f = (rng.random((900, 20)) < 0.2) * rng.random((900, 20))
    for j in range(n_parts):
        f[:, j] = labels * (part == j)
    own, f1 = own_latents(csr_matrix(f), rows_of(torch.from_numpy(labels)))
    assert sorted(own) == list(range(n_parts))
    assert f1 == 1.0


def test_a_property_that_no_latent_detects_has_none_of_its_own() -> None:
    labels = torch.arange(40) // 2 % 2
    assert own_latents(csr_matrix((40, 6)), rows_of(labels)) == ([], 0.0)
    silent = csr_matrix(1.0 - labels[:, None].numpy())  # fires where the property does not hold
    assert own_latents(silent, rows_of(labels)) == ([], 0.0)


def test_a_probe_points_along_what_tells_the_classes_apart() -> None:
    torch.manual_seed(0)
    labels = (torch.rand(600) < 0.3).long()
    x = torch.randn(600, 5) * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])
    x[:, 1] += 8 * labels
    probe = train_probe(x, rows_of(labels))
    assert probe.f1 > 0.95
    assert probe.direction.norm() == pytest.approx(1.0)
    assert probe.direction[1] > 0.9
    assert (labels[probe.found] == 1).all()
    assert (probe.found % 2 == 1).all()


def test_rows_are_in_their_halves_and_no_token_counts_too_often() -> None:
    labels = torch.tensor([0, 1, -1, 1] * 50)
    ids = torch.tensor([3, 4, 5, 3] * 50)
    tested = torch.arange(200) % 8 >= 4
    generator = torch.Generator().manual_seed(0)
    rows = natural_rows(labels, tested, ids, 6, generator)
    for half, mask in ((rows.train, ~tested), (rows.test, tested)):
        assert mask[half].all()
        assert (labels[half] >= 0).all()
        assert ids[half].bincount().tolist() == [0, 0, 0, 6, 6]
    assert len(natural_rows(labels, tested, ids, None, generator).train) == 75
