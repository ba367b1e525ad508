"""Settings: they can be built, sent to another process, and are those of the document."""

import pickle
from itertools import pairwise

import pytest
import torch

from lightning_sae.studies.broken_latents.settings import EXPERIMENTS, Experiment, Variant
from lightning_sae.studies.broken_latents.train import ExperimentRun

ALL = [(experiment, variant) for experiment in EXPERIMENTS for variant in experiment.variants]


def of(number: int) -> Experiment:
    return next(experiment for experiment in EXPERIMENTS if experiment.number == number)


def test_experiments_are_numbered_and_their_saes_differently_named() -> None:
    assert [experiment.number for experiment in EXPERIMENTS] == list(range(1, 10))
    for experiment in EXPERIMENTS:
        names = [variant.name for variant in experiment.variants]
        assert len({*names}) == len(names)


@pytest.mark.parametrize(("experiment", "variant"), ALL)
def test_every_world_and_sae_can_be_built(experiment: Experiment, variant: Variant) -> None:
    run = ExperimentRun(experiment, variant, seed=3, samples=5000)
    world = run.world()
    sae = run.sae(world.d_in)
    assert (sae.d_in, sae.d_sae, sae.tied) == (world.d_in, experiment.d_sae, variant.tied)
    assert sae.l1_coefficient == experiment.l1_coefficient
    assert (sae.peaks is not None) == variant.has_loss
    assert len(run.callbacks()) == 1 + variant.has_loss
    assert pickle.loads(pickle.dumps(run)).name == run.name


def test_features_4_to_8_have_the_largest_expected_squared_error() -> None:
    world = ExperimentRun(of(3), of(3).variants[0], 0, 1).world()
    expected = world.probabilities * world.magnitudes.square()
    assert sorted(expected.topk(5).indices.tolist()) == [4, 5, 6, 7, 8]
    assert world.magnitudes[0] == 20
    assert world.magnitudes[-1] == 1
    assert world.probabilities[-1] == pytest.approx(0.3)
    steps = [(b - a).item() for a, b in pairwise(world.probabilities)]
    assert steps == pytest.approx([world.probabilities[0].item()] * 19, rel=1e-4)


@pytest.mark.parametrize(("number", "parent"), [(4, 12), (5, 6), (6, 6)])
def test_a_parent_fires_whenever_a_child_does(number: int, parent: int) -> None:
    world = ExperimentRun(of(number), of(number).variants[0], 0, 1).world()
    fires = world.sample(5000, torch.Generator().manual_seed(0)).magnitudes > 0
    child = fires[:, 5] | fires[:, 7]
    assert fires[child, parent].all()
    assert fires[~child, parent].float().mean() == pytest.approx(
        world.probabilities[parent].item(), abs=0.03
    )


def test_superposition_has_cosines_near_a_twentieth() -> None:
    world = ExperimentRun(of(6), of(6).variants[0], 0, 1).world()
    cosines = (world.features @ world.features.T).abs()
    off = cosines[~torch.eye(20, dtype=torch.bool)]
    assert world.features.shape == (20, 19)
    assert off.max() < 0.06
    assert off.mean() > 0.04
