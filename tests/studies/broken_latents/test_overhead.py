"""Two ways to do the same steps."""

from dataclasses import replace

import pytest
import torch

from lightning_sae.studies.broken_latents import overhead as module
from lightning_sae.studies.broken_latents.overhead import by_trainer, in_plain_loop, overhead
from lightning_sae.studies.broken_latents.settings import BATCH_SIZE, EXPERIMENTS
from lightning_sae.studies.broken_latents.train import ExperimentRun

RUN = ExperimentRun(EXPERIMENTS[3], EXPERIMENTS[3].variants[0], 0, 5 * BATCH_SIZE)


def test_both_ways_train_to_the_same_weights() -> None:
    found = []
    for way in (by_trainer, in_plain_loop):
        world = RUN.world()
        sae = RUN.sae(world.d_in)
        times = way(RUN, sae, world)
        assert len(times) == 5
        assert times == sorted(times)
        found.append(sae)
    before = RUN.sae(found[0].d_in)
    assert not torch.equal(found[0].W_dec, before.W_dec)
    assert torch.equal(found[0].W_dec, found[1].W_dec)
    assert torch.equal(found[0].b_dec, found[1].b_dec)
    assert torch.equal(found[0].silent_for, found[1].silent_for)


def test_first_steps_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNTIMED", 2)
    ways = {"by_trainer": 3e-6, "in_plain_loop": 2e-6}
    for name, slow in ways.items():
        times = [50.0, 100.0, *(100 + slow * step for step in range(1, 5))]
        monkeypatch.setattr(module, name, lambda *_, times=times: times)
    assert overhead(replace(RUN, samples=1), steps=4) == {
        "trainer_microseconds": 3,
        "plain_microseconds": 2,
        "share_of_lightning": pytest.approx(1 / 3, abs=1e-3),
    }
