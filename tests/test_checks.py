import math

import numpy as np
import pytest

from lightning_sae.checks import (
    all_at_once,
    require_betas,
    require_integers,
    require_k,
    require_positive,
)


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


def test_bad_arguments_are_named_together_without_what_follows_from_them():
    def build(lr, rows):
        require_positive(lr=lr, rows=rows)
        return math.sqrt(1 / lr), np.zeros(rows)

    with pytest.raises(ValueError, match="positive") as refused, all_at_once():
        build(0, -1)
    assert str(refused.value) == (
        "Expected argument `lr` to be positive but got 0.\n"
        "Expected argument `rows` to be positive but got -1."
    )
    with pytest.raises(ValueError, match="`lr`") as refused:
        build(0, -1)  # each by itself again
    assert "`rows`" not in str(refused.value)


def test_other_errors_pass_where_no_argument_is_bad():
    with pytest.raises(KeyError, match="missing"), all_at_once():
        raise KeyError("missing")
    with all_at_once():
        require_positive(lr=1)


def test_a_last_error_about_an_argument_is_named_with_the_others():
    def build():
        require_positive(lr=0)
        try:
            raise ValueError("Expected argument `hook_name` to be a hook but got `x`.")
        except ValueError as error:
            raise ValueError("Given value: x") from error

    with pytest.raises(ValueError, match="`lr`.*\n.*`hook_name`"), all_at_once():
        build()
