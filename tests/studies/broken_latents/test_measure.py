"""Peaks of hand-made histograms; hand-made SAEs compared with their world."""

import pytest
import torch

from lightning_sae.architectures import ReLUSAE, TiedSAE
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.broken_latents.measure import measure
from lightning_sae.studies.shared.peaks import count_peaks, histogram, overlap


def counts(*values: float) -> torch.Tensor:
    """A histogram of 100 bins whose last ones are given."""
    return torch.cat([torch.zeros(100 - len(values)), torch.tensor(values)])


@pytest.mark.parametrize(
    ("histogram", "peaks"),
    [
        (counts(), 0),
        (counts(7.0), 1),
        (counts(1.0, 4.0, 9.0, 4.0, 1.0), 1),
        (counts(9.0, 0.0, 9.0), 2),
        (counts(9.0, 4.0, 9.0), 2),
        (counts(9.0, 5.0, 9.0), 1),
        (counts(9.0, 4.0, 6.0, 9.0), 2),
        (counts(9.0, 4.0, 1.0, 1.5, 1.0, 9.0), 2),
        (counts(9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 9.0), 4),
        (counts(0.0, 9.0, 0.0, 0.0, 9.0, 0.0), 2),
    ],
)
def test_peaks_are_those_with_a_dip_to_half_between(histogram: torch.Tensor, peaks: int) -> None:
    assert count_peaks(histogram) == peaks
    assert count_peaks(1000 * histogram) == peaks


def test_a_few_activations_are_no_peak() -> None:
    assert count_peaks(counts(1.0, 0.0, 120.0)) == 1
    assert count_peaks(counts(2.0, 0.0, 120.0)) == 2


def test_interference_near_zero_is_no_peak() -> None:
    histogram = counts(50.0)
    histogram[:15] = 1000.0
    assert count_peaks(histogram) == 1
    histogram[15:16] = 1000.0
    assert count_peaks(histogram) == 2


def test_histogram_counts_what_is_above_zero() -> None:
    f = torch.tensor([0.0, 0.0, 0.4, 0.6, 1.0])
    assert histogram(f, bins=2).tolist() == [1.0, 2.0]
    assert histogram(torch.zeros(3), bins=2).tolist() == [0.0, 0.0]


@pytest.fixture
def world() -> ToyDataModule:
    return ToyDataModule(3, 6, probabilities=(0.5, 0.4, 0.3), requires={1: 0})


def measured(sae: ReLUSAE, world: ToyDataModule):
    sample = world.sample(20_000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return measure(sae, world, sample, sae.encode(sample.x))


def tied(rows: torch.Tensor) -> TiedSAE:
    sae = TiedSAE(rows.shape[1], len(rows))
    sae.W_dec.data.copy_(rows)
    return sae


def test_an_sae_of_the_features_is_measured_as_such(world: ToyDataModule) -> None:
    m = measured(tied(world.features[[2, 0, 1]]), world)
    torch.testing.assert_close(m.decoder, torch.eye(3)[[2, 0, 1]], atol=1e-6, rtol=0)
    torch.testing.assert_close(m.encoder, m.decoder)
    assert m.features.tolist() == [2, 0, 1]
    assert m.peaks.tolist() == [1, 1, 1]
    assert m.alive.all()
    torch.testing.assert_close(m.frequency, torch.tensor([0.3, 0.5, 0.2]), atol=0.02, rtol=0)
    assert m.squared_error < 1e-10
    assert m.l0 == pytest.approx(1.0, abs=0.03)
    assert m.parent_silent == 0
    assert m.parent_in_child == pytest.approx(0, abs=1e-6)


def test_a_latent_counts_by_what_it_adds_to_the_reconstruction(world: ToyDataModule) -> None:
    """An activation of a thousandth with a decoder row of norm 1000 is no faint one."""
    sae = ReLUSAE(6, 3, decoder_norm="free")
    sizes = torch.tensor([1.0, 1000.0, 1.0])
    sae.W_dec.data.copy_(world.features * sizes.unsqueeze(1))
    sae.W_enc.data.copy_(world.features.T / sizes)
    m = measured(sae, world)
    torch.testing.assert_close(m.frequency, torch.tensor([0.5, 0.2, 0.3]), atol=0.02, rtol=0)
    assert m.alive.all()
    assert m.peaks.tolist() == [1, 1, 1]


def test_a_latent_of_two_features_has_the_peaks_of_their_combinations(world: ToyDataModule) -> None:
    mixture = 0.8 * world.features[0] + 0.6 * world.features[2]
    m = measured(tied(torch.stack([mixture, world.features[1]])), world)
    assert m.best[0].item() == pytest.approx(0.8, abs=1e-6)
    assert m.peaks.tolist() == [3, 1]  # .6, .8 and 1.4; and one feature


def test_a_latent_that_points_away_from_all_features_is_dead(world: ToyDataModule) -> None:
    m = measured(tied(torch.stack([world.features[0], -world.features[1]])), world)
    assert m.alive.tolist() == [True, False]
    assert m.peaks.tolist() == [1, 0]


def test_absorption_shows_in_the_parents_silence_and_the_childs_decoder(
    world: ToyDataModule,
) -> None:
    parent, child, other = world.features
    sae = ReLUSAE(6, 3)
    sae.W_dec.data.copy_(torch.stack([parent, 0.8 * child + 0.6 * parent, other]))
    sae.W_enc.data.copy_(torch.stack([parent - child, child, other]).T)
    m = measured(sae, world)
    assert m.parent_silent == 1
    assert m.parent_silent_alone == 0
    assert m.parent_in_child == pytest.approx(0.6, abs=1e-6)
    assert m.encoder[0, 1].item() == pytest.approx(-(0.5**0.5), abs=1e-6)


def test_a_world_without_pairs_has_no_absorption() -> None:
    world = ToyDataModule(2, 4, probabilities=0.5)
    m = measured(tied(world.features), world)
    assert (m.parent_silent, m.parent_silent_alone, m.parent_in_child) == (None, None, None)


def test_overlap_is_the_common_area_of_two_distributions() -> None:
    f = torch.tensor([4.0, 4.0, 1.0, 2.0, 4.0, 0.0, 0.0])
    fires = torch.tensor([True, True, True, False, False, True, False])
    assert overlap(f, fires) == pytest.approx(0.5)  # of 4: 2/3 and 1/2
    assert overlap(f, ~fires) == pytest.approx(0.5)
    assert overlap(f, torch.ones(7, dtype=torch.bool)) == 0
    assert overlap(f, f > 1.5) == 0


def test_peaks_of_a_mixture_overlap_once_magnitudes_are_spread() -> None:
    found = []
    for spread in (0.1, 1.0):
        spread_world = ToyDataModule(2, 4, probabilities=0.5, magnitude_spread=spread)
        mixture = 0.9 * spread_world.features[0] + 0.19**0.5 * spread_world.features[1]
        found.append(measured(tied(mixture.unsqueeze(0)), spread_world).overlap.item())
    assert found[0] < 0.05
    assert 0.3 < found[1] < 0.8
