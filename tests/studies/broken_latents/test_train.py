"""One run: what follows from its seed, and the schedule of the auxiliary loss."""

import pytest
import torch

from lightning_sae.callbacks import AuxThresholdWarmup
from lightning_sae.studies.broken_latents.settings import BATCH_SIZE, EXPERIMENTS
from lightning_sae.studies.broken_latents.train import ExperimentRun, train

ONE_LATENT = EXPERIMENTS[6]
PARENT = EXPERIMENTS[3]


def run(seed: int = 0, steps: int = 4) -> ExperimentRun:
    return ExperimentRun(ONE_LATENT, ONE_LATENT.variants[1], seed, steps * BATCH_SIZE)


def trained(asked: ExperimentRun) -> torch.Tensor:
    sae, _, _ = train(asked, lambda _: None)
    return sae.W_dec.detach()


def test_weights_follow_from_the_seed() -> None:
    assert torch.equal(trained(run(seed=1)), trained(run(seed=1)))
    assert not torch.equal(trained(run(seed=1)), trained(run(seed=2)))


def test_worlds_of_different_seeds_have_other_features() -> None:
    assert not torch.equal(run(seed=1).world().features, run(seed=2).world().features)


def test_the_callers_chance_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    trained(run())
    assert torch.equal(torch.rand(2), expected)


def test_rows_have_norm_one_and_an_untied_sae_has_two_matrices() -> None:
    untied = ExperimentRun(ONE_LATENT, ONE_LATENT.variants[0], 0, 4 * BATCH_SIZE)
    sae, _, _ = train(untied, lambda _: None)
    assert sae.W_dec.norm(dim=1).item() == pytest.approx(1.0)
    assert not torch.equal(sae.W_enc.T, sae.W_dec)
    assert not sae.training


def test_free_rows_start_at_the_norm_that_is_given_and_leave_it() -> None:
    start, end = (
        ExperimentRun(ONE_LATENT, ONE_LATENT.variants[1], 0, steps * BATCH_SIZE, "free", 0.1)
        for steps in (1, 60)
    )
    assert start.sae(50).W_dec.norm(dim=1).item() == pytest.approx(0.1)
    assert start.callbacks() == []
    assert 0.2 < trained(end).norm(dim=1).item() < 0.9


def test_the_loss_is_off_for_a_third_and_rises_for_a_third() -> None:
    asked = ExperimentRun(PARENT, PARENT.variants[1], 0, 300 * BATCH_SIZE)
    warmup = next(c for c in asked.callbacks() if isinstance(c, AuxThresholdWarmup))
    shares = [warmup.share(step) for step in (0, 99, 149, 199, 299)]
    assert shares == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("samples", "steps"), [(1, 1), (BATCH_SIZE, 1), (BATCH_SIZE + 1, 2), (10 * BATCH_SIZE, 10)]
)
def test_samples_are_whole_batches(samples: int, steps: int) -> None:
    assert ExperimentRun(ONE_LATENT, ONE_LATENT.variants[0], 0, samples).steps == steps


def test_progress_is_reported_in_activations() -> None:
    told: list[int] = []
    train(run(steps=250), told.append)
    assert told == [100 * BATCH_SIZE, 100 * BATCH_SIZE]


def test_folders_of_runs_are_plain_names() -> None:
    assert ExperimentRun(PARENT, PARENT.variants[1], 2, 1).name == "4-tied-auxiliary-loss-seed-2"
