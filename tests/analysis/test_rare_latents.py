"""Rare latents: directions and common firings, on SAEs made by hand."""

import math

import pytest
import torch
from torch import Tensor

from lightning_sae import ReLUSAE
from lightning_sae.analysis.rare_latents import (
    encoder_decoder_cosines,
    firing_together,
    mean_direction,
    median,
    rare_directions,
    share_on_one_direction,
)


def sae_of(encoder: Tensor, decoder: Tensor | None = None, bias: float = 0.0) -> ReLUSAE:
    """An SAE with these rows, one for each latent."""
    d_sae, d_in = encoder.shape
    sae = ReLUSAE(d_in, d_sae, apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_enc.copy_(encoder.T)
        sae.W_dec.copy_(encoder if decoder is None else decoder)
        sae.b_enc.fill_(bias)
    return sae


ROWS = torch.tensor([[4.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
RARE = torch.tensor([True, True, False, False])


def test_rows_that_are_one_direction_have_a_cosine_of_one_with_their_mean() -> None:
    decoder = torch.eye(3)[[0, 1, 1, 2]]
    found = rare_directions(sae_of(ROWS, decoder), RARE)
    assert found == {
        "n_rare": 2.0,
        "cosine_with_mean": 1.0,
        "alike": 1.0,
        "others_with_mean": 0.0,
        "encoder_on_one_direction": 1.0,
        "decoder_on_one_direction": 0.5,
    }


def test_without_rare_latents_there_is_nothing_to_compare() -> None:
    found = rare_directions(sae_of(ROWS, torch.eye(3)[[0, 1, 1, 2]]), torch.zeros(4).bool())
    assert found.pop("n_rare") == 0
    assert all(math.isnan(value) for value in found.values())


def test_the_mean_weighs_rows_by_their_length_and_cosines_do_not() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -1.0]])
    torch.testing.assert_close(mean_direction(rows[:2]), torch.tensor([0.6, 0.8]))
    found = rare_directions(sae_of(rows), torch.tensor([True, True, False]))
    assert found["cosine_with_mean"] == pytest.approx(0.6)  # of two the lower is the median
    assert found["others_with_mean"] == pytest.approx(-0.8)
    assert found["alike"] == 0.0
    assert found["encoder_on_one_direction"] == pytest.approx(16 / 25)


def test_without_rare_latents_there_is_no_direction() -> None:
    found = rare_directions(sae_of(ROWS), torch.zeros(4, dtype=torch.bool))
    assert found["n_rare"] == 0.0
    for name in ("cosine_with_mean", "alike", "encoder_on_one_direction"):
        assert math.isnan(found[name])
    assert torch.equal(mean_direction(ROWS[:0]), torch.zeros(3))
    together = firing_together(sae_of(ROWS), torch.zeros(4, dtype=torch.bool), [torch.ones(2, 3)])
    assert all(math.isnan(value) for value in together.values())


def test_the_most_aligned_activation_is_found_over_all_batches() -> None:
    # The rare latents fire where the first coordinate is above 1/4 and 1/2.
    sae = sae_of(ROWS, bias=-1.0)
    batches = [
        torch.tensor([[0.1, 9.0, 0.0], [0.3, 0.0, 0.0]]),
        torch.zeros(0, 3),
        torch.tensor([[0.4, 0.0, 0.0], [0.0, 0.0, 3.0]]),
    ]
    found = firing_together(sae, RARE, batches)
    assert found["on_most_aligned"] == found["most_at_once"] == 0.5
    mean = torch.cat(batches).mean(0)
    assert found["mean_activation"] == pytest.approx(float(mean[0] / mean.norm()))
    again = firing_together(sae, RARE, [*batches, torch.tensor([[0.6, 0.0, 0.0]])])
    assert again["on_most_aligned"] == again["most_at_once"] == 1.0


def test_most_may_fire_where_the_mean_direction_does_not_reach_furthest() -> None:
    rows = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    found = firing_together(sae_of(rows), torch.tensor([True, True]), [x])
    assert (found["on_most_aligned"], found["most_at_once"]) == (0.5, 1.0)


def test_rows_all_about_lie_on_no_direction() -> None:
    assert share_on_one_direction(torch.eye(5)) == pytest.approx(0.2)
    assert share_on_one_direction(torch.ones(7, 5)) == pytest.approx(1.0)


def test_encoder_and_decoder_are_compared_latent_by_latent() -> None:
    decoder = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 3.0, 4.0]])
    cosines = encoder_decoder_cosines(sae_of(ROWS, decoder))
    torch.testing.assert_close(cosines, torch.tensor([0.0, -1.0, 1.0, 0.8]))
    assert median(cosines) == 0.0
    assert math.isnan(median(cosines[:0]))
