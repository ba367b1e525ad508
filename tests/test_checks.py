import math

import numpy as np
import pytest

from lightning_sae.checks import require_betas, require_integers, require_k


@pytest.mark.parametrize("value", [1.5, 2.0, True, "2", None, math.nan])
def test_what_is_counted_is_a_whole_number(value):
    with pytest.raises(ValueError, match="`k` to be a whole number but got"):
        require_integers(d_sae=4, k=value)
    require_integers(k=np.int64(3), d_sae=-1)


@pytest.mark.parametrize("k", [0, -1, 10, True, "2", math.nan, math.inf])
def test_there_must_be_k_latents(k):
    with pytest.raises(ValueError, match="`k` to be above 0 and at most `d_sae`=9 but got"):
        require_k(k, 9)
    require_k(0.5, 9)
    require_k(9, 9)


@pytest.mark.parametrize(
    "betas", [(0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), 0.9, ("0.9", 0.9), (math.nan, 0.9)]
)
def test_decay_rates_are_two_and_below_one(betas):
    with pytest.raises(ValueError, match="`betas` to be two numbers of at least 0 and below 1 but"):
        require_betas(betas)
    require_betas([0, 0.999])
