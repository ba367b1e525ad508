"""Each test of a verdict, on cosines written by hand."""

from dataclasses import replace

import pytest
import torch

from lightning_sae.studies.broken_latents.checks import (
    absorbed,
    clean,
    dead,
    exactly,
    learnt,
    mixed,
    one_mixture,
    several_peaks,
    spare_latents_misused,
    takes_in,
)
from lightning_sae.studies.broken_latents.measure import Measured


def measured(decoder: list[list[float]], dead: tuple[int, ...] = ()) -> Measured:
    """Latents with these cosines, all alive but some, with one peak each."""
    cosines = torch.tensor(decoder)
    frequency = torch.full((len(cosines),), 0.2)
    frequency[list(dead)] = 0.0
    return Measured(
        decoder=cosines,
        encoder=cosines,
        frequency=frequency,
        peaks=torch.ones(len(cosines), dtype=torch.int64),
        overlap=torch.zeros(len(cosines)),
        parent_silent=None,
        parent_silent_alone=None,
        parent_in_child=None,
        squared_error=0.0,
        l0=1.0,
    )


ONE_EACH = [[0.0, 0.99, 0.0], [-0.99, 0.0, 0.1], [0.0, 0.0, 0.99]]
TWICE = [[0.99, 0.0, 0.0], [0.99, 0.0, 0.1], [0.0, 0.0, 0.99]]
MIXED = [[0.9, 0.43, 0.0], [-0.43, 0.9, 0.0], [0.0, 0.0, 0.99]]


def test_clean_wants_one_feature_of_each_living_latent() -> None:
    assert clean().met(measured(ONE_EACH))
    assert clean().met(measured(TWICE))
    assert not clean(0.995).met(measured(ONE_EACH))
    assert not clean().met(measured(MIXED))
    assert clean().met(measured(MIXED, dead=(0, 1)))
    assert not clean().met(measured(ONE_EACH, dead=(0, 1, 2)))


def test_exactly_wants_each_feature_once_and_no_other() -> None:
    assert exactly((0, 1, 2)).met(measured(ONE_EACH))
    assert not exactly((0, 1)).met(measured(ONE_EACH))
    assert exactly((0, 2)).met(measured(ONE_EACH, dead=(0,)))
    assert not exactly((0, 2)).met(measured(TWICE))
    assert not exactly((0, 1, 2)).met(measured(MIXED))


def test_learnt_wants_a_living_latent() -> None:
    assert learnt(1).met(measured(ONE_EACH))
    assert not learnt(1).met(measured(ONE_EACH, dead=(0,)))
    assert not learnt(1).met(measured(MIXED))


def test_dead_counts() -> None:
    assert dead(1).met(measured(ONE_EACH, dead=(2,)))
    assert not dead(1).met(measured(ONE_EACH))
    assert not dead(1).met(measured(ONE_EACH, dead=(1, 2)))


def test_mixed_counts_living_latents_without_a_feature() -> None:
    assert mixed().met(measured(MIXED))
    assert not mixed(at_least=3).met(measured(MIXED))
    assert not mixed(below=0.85).met(measured(MIXED))
    assert not mixed().met(measured(MIXED, dead=(0,)))


def test_takes_in_wants_the_parent_in_the_latents_of_all_children() -> None:
    both = [[0.9, 0.0, 0.4], [0.0, 0.8, -0.5]]
    one = [[0.9, 0.0, 0.4], [0.0, 1.0, 0.0]]
    assert takes_in(2, (0, 1)).met(measured(both))
    assert not takes_in(2, (0, 1)).met(measured(one))
    assert takes_in(2, (0,)).met(measured(one))


@pytest.mark.parametrize(
    ("peaks", "met"), [([3, 2, 1], True), ([3, 1, 1], False), ([3, 2, 2], False)]
)
def test_several_peaks_are_wanted_of_mixtures_alone(peaks: list[int], met: bool) -> None:
    m = replace(measured(MIXED), peaks=torch.tensor(peaks))
    assert several_peaks().met(m) is met


@pytest.mark.parametrize(
    ("silent", "alone", "inside", "met"),
    [
        (1.0, 0.0, 0.7, True),
        (0.5, 0.0, 0.7, False),
        (1.0, 1.0, 0.7, False),
        (1.0, 0.0, 0.1, False),
        (None, None, None, False),
    ],
)
def test_absorption_is_silence_where_the_child_fires_and_a_parent_in_its_decoder(
    silent: float | None, alone: float | None, inside: float | None, met: bool
) -> None:
    m = replace(
        measured(ONE_EACH),
        parent_silent=silent,
        parent_silent_alone=alone,
        parent_in_child=inside,
    )
    assert absorbed().met(m) is met


def test_spare_latents_are_misused_by_repeating_or_combining() -> None:
    assert spare_latents_misused().met(measured(TWICE))
    assert spare_latents_misused().met(measured(MIXED))
    assert not spare_latents_misused().met(measured(ONE_EACH))
    assert not spare_latents_misused().met(measured(TWICE, dead=(0,)))


def test_one_mixture_has_all_of_some_and_none_of_others() -> None:
    check = one_mixture((0, 1), (2,))
    assert check.met(measured([[0.8, -0.6, 0.0]]))
    assert not check.met(measured([[1.0, 0.0, 0.0]]))
    assert not check.met(measured([[0.8, 0.5, 0.3]]))


def test_expectations_read_as_sentences() -> None:
    single = "feature 0 has one latent, and nothing else has one, with |cos| > 0.98"
    assert exactly([0]).words == single
    assert exactly((3, 1, 2)).words == "features 1, 2 and 3 have one latent each, with |cos| > 0.98"
    assert takes_in(12, (5, 7)).words == (
        "feature 12 is in the latents of 5 and 7, with |cos| > 0.3"
    )
    assert one_mixture((0, 1, 2), (3,)).words == "one latent has features 0, 1 and 2 in it, not 3"
