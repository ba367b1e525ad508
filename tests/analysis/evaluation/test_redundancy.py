"""Duplicates and latents that fire together, against loops."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from lightning_sae.analysis.evaluation.redundancy import duplicate_share, together_share


def test_duplicates_are_counted_among_the_living() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 16)
    rows[3], rows[7], rows[9] = 2 * rows[1], -rows[2], rows[4]
    alive = torch.ones(40, dtype=torch.bool)
    assert duplicate_share(rows, alive) == pytest.approx(4 / 40)  # 1, 3 and 4, 9; 7 is opposite
    alive[3] = False
    assert duplicate_share(rows, alive) == pytest.approx(2 / 39)


def test_latents_that_fire_together_are_a_loops() -> None:
    rng = np.random.default_rng(0)
    f = (rng.random((300, 12)) < 0.3) * rng.random((300, 12))
    f[:, 5] = (f[:, 2] > 0) * 3.0  # the same tokens
    f[:, 6] = f[:, 1] * (np.arange(300) % 2)  # half of them
    f[:, 11] = 0
    fires, counted, together = f > 0, 0, 0
    for i in range(12):
        if fires[:, i].sum() < 10:
            continue
        counted += 1
        together += any(
            (fires[:, i] & fires[:, j]).sum() >= 0.9 * (fires[:, i] | fires[:, j]).sum()
            for j in range(12)
            if j != i and fires[:, j].sum() >= 10
        )
    assert counted == 11
    assert together_share(csr_matrix(f)) == pytest.approx(together / counted) == 2 / 11
    assert math.isnan(together_share(csr_matrix((300, 12))))
