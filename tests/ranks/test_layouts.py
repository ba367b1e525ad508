"""Each step's gradient is the mean over ranks, whatever the layout it was taken in."""

import pytest
import torch

from tests.ranks.conftest import OfRanks
from tests.ranks.layouts import LAYOUTS, fit_layout, inputs


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_the_weights_that_one_trains_on_both_batches(
    name: str, of_ranks: OfRanks
) -> None:
    expected = fit_layout(LAYOUTS[name], inputs().flatten(1, 2), seed=0)
    for results in of_ranks.results:
        torch.testing.assert_close(results["layouts"][name], expected, rtol=0, atol=1e-10)
