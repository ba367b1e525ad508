from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sae.functional import dead_fraction, feature_frequency, frequency_below, l0

ALL = [dead_fraction, feature_frequency, frequency_below, l0]
F = torch.tensor([[0.0, 1.0, 0.1, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, -1.0]])


def test_values_on_a_hand_written_code() -> None:
    assert l0(F).item() == pytest.approx(5 / 3)
    assert feature_frequency(F).tolist() == pytest.approx([0, 1, 1 / 3, 1 / 3])
    assert dead_fraction(F).item() == 1 / 4
    assert frequency_below(F, threshold=0.3).item() == 1 / 4
    assert frequency_below(F, threshold=0.4).item() == 3 / 4


@pytest.mark.parametrize("function", ALL)
def test_scale_of_the_latents_does_not_matter(function: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(function(F), function(1e-3 * F))


@pytest.mark.parametrize("function", ALL)
def test_leading_axes_are_all_token_axes(function: Callable[[Tensor], Tensor]) -> None:
    f = torch.randn(2, 3, 5).relu()
    assert torch.equal(function(f), function(f.view(6, 5)))
    assert torch.equal(function(f[0, 0]), function(f[:1, 0]))


def test_l0_is_the_sum_of_frequencies() -> None:
    assert l0(F).item() == pytest.approx(feature_frequency(F).sum().item())


@pytest.mark.parametrize("function", ALL)
def test_scalar_is_refused(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as for users
    with pytest.raises(ValueError, match=r"`f` to have shape \[\.\.\., d_sae\] but got a scalar"):
        function(torch.tensor(1.0))


def test_threshold_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`threshold` to be in \(0, 1\] but got 10.0"):
        frequency_below(F, threshold=10.0)
