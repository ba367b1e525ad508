import math

import pytest
import torch
from torch import Tensor

from lightning_sae.data.scaling import estimate_scaling


def test_means_and_norms_of_four_rows_by_hand() -> None:
    # About their mean (1, 2) these rows have norms 3, 3, 4 and 4.
    rows = torch.tensor([[4.0, 2.0], [-2.0, 2.0], [1.0, 6.0], [1.0, -2.0]])
    both = estimate_scaling(rows, center=True, scale=True)
    assert both.mean.tolist() == [1.0, 2.0]
    assert both.scale.item() == pytest.approx(math.sqrt(2) / 3.5)
    centred = estimate_scaling(rows, center=True, scale=False)
    assert centred.mean.tolist() == [1.0, 2.0]
    assert centred.scale.item() == 1.0
    scaled = estimate_scaling(rows, center=False, scale=True)
    norms = [math.hypot(*row) for row in rows.tolist()]
    assert scaled.mean.tolist() == [0.0, 0.0]
    assert scaled.scale.item() == pytest.approx(math.sqrt(2) / (sum(norms) / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_rows_have_mean_zero_and_mean_norm_sqrt_d(dtype: torch.dtype) -> None:
    rows = (torch.randn(500, 24) * 30 + 100).to(dtype)
    scaling = estimate_scaling(rows, center=True, scale=True)
    seen = (rows.float() - scaling.mean) * scaling.scale
    assert scaling.mean.dtype == scaling.scale.dtype == torch.float32
    torch.testing.assert_close(seen.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    assert seen.norm(dim=-1).mean().item() == pytest.approx(math.sqrt(24), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "center"),
    [
        (torch.full((4, 3), 7.0), True),
        (torch.zeros(4, 3), False),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), False),
        (torch.tensor([[1.0, 2.0], [math.inf, 0.0]]), True),
    ],
)
def test_rows_that_give_no_scale_are_refused(rows: Tensor, center: bool) -> None:
    with pytest.raises(ValueError, match="mean norm is .*set `center` and `scale` to false"):
        estimate_scaling(rows, center, scale=True)


def test_a_mean_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be scaled"):
        estimate_scaling(torch.tensor([[math.nan, 1.0]]), center=True, scale=False)


def test_ranks_estimate_what_one_would_on_all_their_rows() -> None:
    rows = torch.randn(40, 6) + torch.arange(40).unsqueeze(1)
    expected = estimate_scaling(rows, center=True, scale=True)
    first, second = rows.split(20)
    for own, other in ((first, second), (second, first)):
        lengths = (other - rows.mean(0)).norm(dim=-1).mean()

        def mean_of_ranks(value, other=other, lengths=lengths):
            return (value + (other.mean(0) if value.ndim else lengths)) / 2

        found = estimate_scaling(own, True, True, mean_of_ranks)
        torch.testing.assert_close(found, expected)
