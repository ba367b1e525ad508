import pytest
import torch

from lightning_sae.functional.resampling import (
    dead_latents,
    mean_norm,
    resampling_weights,
    sample_directions,
)


def test_inputs_are_drawn_in_proportion_to_their_loss_squared():
    inputs, losses = torch.eye(3), torch.tensor([1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    draws = [sample_directions(inputs, losses, 1, generator)[0] for _ in range(4000)]
    shares = torch.stack(draws).mean(0)
    torch.testing.assert_close(shares, torch.tensor([1.0, 4.0, 9.0]) / 14, atol=0.03, rtol=0)


def test_no_input_is_drawn_twice_while_there_are_enough():
    inputs, losses = torch.eye(6), torch.tensor([1e-3, 1.0, 1.0, 1e-3, 50.0, 0.0])
    directions = sample_directions(inputs, losses, 5)
    assert torch.equal(directions.sum(0), torch.tensor([1.0, 1, 1, 1, 1, 0]))


def test_inputs_are_drawn_again_where_there_are_too_few():
    inputs, losses = torch.eye(3), torch.tensor([0.0, 2.0, 0.0])
    directions = sample_directions(inputs, losses, 4)
    assert torch.equal(directions, torch.eye(3)[[1, 1, 1, 1]])


def test_directions_are_unit_rows_along_the_inputs():
    inputs = torch.tensor([[3.0, 4.0], [0.0, -7.0]])
    directions = sample_directions(inputs, torch.tensor([1.0, 1.0]), 2)
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    torch.testing.assert_close(directions[directions[:, 0].argsort(descending=True)], expected)


def test_half_precision_inputs_give_directions_in_single_precision():
    directions = sample_directions(torch.randn(20, 9).bfloat16(), torch.ones(20), 20)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(20))


def test_equal_generators_draw_the_same_and_the_global_one_is_left_alone():
    inputs, losses = torch.randn(100, 3), torch.rand(100)
    before = torch.get_rng_state()
    first, second = (
        sample_directions(inputs, losses, 5, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_zero_losses_make_all_inputs_alike():
    weights = resampling_weights(torch.ones(4, 2), torch.zeros(4))
    assert torch.equal(weights, torch.ones(4, dtype=torch.float64))


def test_an_input_of_zero_is_never_drawn():
    inputs = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert resampling_weights(inputs, torch.tensor([9.0, 0.0])).tolist() == [0.0, 1.0]
    assert resampling_weights(inputs, torch.tensor([9.0, 3.0])).tolist() == [0.0, 1.0]


def test_losses_whose_square_overflows_keep_their_ratio():
    weights = resampling_weights(torch.ones(2, 1), torch.tensor([1e38, 2e38]))
    assert weights.tolist() == pytest.approx([0.25, 1.0])


def test_inputs_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="all of them are zero as the encoder sees them.*constant"):
        sample_directions(torch.zeros(3, 2), torch.ones(3), 1)


def test_the_mean_norm_is_over_rows_and_one_without_any():
    assert mean_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item() == 3.0
    assert mean_norm(torch.empty(0, 4)).item() == 1.0


@pytest.mark.parametrize(
    ("min_frequency", "expected"),
    [
        (0.0, [True, False, False, False]),
        (0.25, [True, True, False, False]),  # 1 of 8 is below, 2 of 8 is not
    ],
)
def test_dead_is_below_the_frequency_and_never_fired_is_always_dead(min_frequency, expected):
    fired = torch.tensor([0, 1, 2, 8])
    assert dead_latents(fired, 8, min_frequency).tolist() == expected
