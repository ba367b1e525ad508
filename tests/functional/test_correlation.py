"""Correlations against closed forms and against fits."""

import pytest
import torch

from lightning_sae.functional.correlation import correlation, partial_correlation


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_that_of_torch() -> None:
    x = normals(3, 200)
    x[1] += 0.5 * x[0]
    for i in range(3):
        for j in range(3):
            assert correlation(x[i], x[j]) == pytest.approx(torch.corrcoef(x)[i, j].item())


def test_units_do_not_matter() -> None:
    x, y = normals(2, 50)
    assert correlation(-3 * x + 7, y) == pytest.approx(-correlation(x, y).item())


def test_the_partial_one_is_that_of_what_a_linear_fit_leaves() -> None:
    x, y, z = normals(3, 100)
    x, y = x + 2 * z, y - z + 0.3 * x

    def left(v: torch.Tensor) -> torch.Tensor:
        design = torch.stack([z, torch.ones_like(z)], -1)
        return v - design @ torch.linalg.lstsq(design, v.unsqueeze(-1)).solution.squeeze(-1)

    assert partial_correlation(x, y, z) == pytest.approx(correlation(left(x), left(y)).item())
    assert abs(partial_correlation(x, y, z) - correlation(x, y)) > 0.3


def test_a_common_cause_leaves_nothing() -> None:
    noise, z = normals(2, 100_000), normals(3, 100_000)[2]
    x, y = z + noise[0], z + noise[1]
    assert correlation(x, y) == pytest.approx(0.5, abs=0.01)
    assert partial_correlation(x, y, z) == pytest.approx(0.0, abs=0.01)


def test_a_constant_has_none() -> None:
    assert correlation(torch.ones(3), torch.tensor([1.0, 2.0, 4.0])).isnan()


def test_lengths_have_to_agree(unchecked: None) -> None:
    with pytest.raises(ValueError, match="to have equal length but got 3 and 4"):
        correlation(torch.ones(3), torch.ones(4))
