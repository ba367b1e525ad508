"""Figures of an SAE's weights against hand-made ones."""

import torch

from lightning_sae import ReLUSAE
from lightning_sae.analysis import weights
from lightning_sae.functional.geometry import unit_rows


def test_geometry_is_that_of_each_latents_rows() -> None:
    sae = ReLUSAE(12, 3, decoder_norm="free")
    with torch.no_grad():
        sae.W_dec.mul_(torch.tensor([[1.0], [2.0], [3.0]]))
        sae.b_enc.copy_(torch.tensor([0.1, 0.2, 0.3]))
    found = weights.latent_geometry(sae)
    torch.testing.assert_close(found["encoder_decoder_cosine"], torch.ones(3))
    torch.testing.assert_close(found["projection"], torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(found["decoder_norm"], torch.tensor([1.0, 2.0, 3.0]))
    assert found["encoder_bias"].tolist() == sae.b_enc.tolist()


def test_rows_of_one_of_ten_and_of_many_neurons_are_told_apart() -> None:
    rows = torch.zeros(3, 1000)
    rows[0, 7] = 5.0
    rows[1, :10] = 1.0
    rows[2] = 1.0
    found = weights.neuron_sparsity(rows)
    torch.testing.assert_close(found["top_1"], torch.tensor([1.0, 0.1, 0.001]))
    torch.testing.assert_close(found["next_9"], torch.tensor([0.0, 0.9, 0.009]))
    assert found["neurons"].tolist() == [1.0, 10.0, 0.0]


def test_kurtosis_of_normal_coordinates_is_zero_and_of_sparse_ones_high() -> None:
    normal = weights.baseline(20, 5000, seed=0)
    assert weights.excess_kurtosis(normal).mean().abs() < 0.05
    one = torch.zeros(1, 100)
    one[0, 0] = 1.0
    # Of n coordinates of which one is 1: the fourth moment over the squared second, less 3.
    p = torch.tensor(0.01, dtype=torch.float64)
    m2, m4 = p * (1 - p), p * (1 - p) ** 4 + (1 - p) * p**4
    torch.testing.assert_close(weights.excess_kurtosis(one.double())[0], m4 / m2**2 - 3)


def test_null_space_share_is_the_part_that_the_matrix_does_not_see() -> None:
    W_out = torch.zeros(4, 3)
    W_out[0, 0], W_out[1, 1] = 2.0, 1.0
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [3.0, 0.0, 4.0, 0.0]])
    torch.testing.assert_close(
        weights.null_space_share(rows, W_out), torch.tensor([0.0, 1.0, 16 / 25])
    )


def test_nearest_rows_are_those_of_a_full_matrix() -> None:
    rows = weights.baseline(30, 6, seed=1)
    indices, cosines = weights.nearest(rows, 4, chunk=7)
    full = unit_rows(rows) @ unit_rows(rows).T
    full.fill_diagonal_(-2)
    expected = full.topk(4)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(cosines, expected.values)
    assert weights.nearest(rows[:2], 4)[0].tolist() == [[1], [0]]


def test_logits_are_centred_products_through_the_output_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec, W_out, W_U = (
        torch.randn(*shape, generator=generator) for shape in ((5, 4), (4, 3), (3, 9))
    )
    found = weights.logit_weights(W_dec, W_out, W_U, 2, chunk=2)
    logits = W_dec @ W_out @ W_U
    logits = logits - logits.mean(1, keepdim=True)
    assert torch.equal(found["raised"], logits.topk(2).indices)
    assert torch.equal(found["lowered"], logits.topk(2, largest=False).indices)
    torch.testing.assert_close(found["raised_by"], logits.topk(2).values)
    direct = weights.logit_weights(W_dec @ W_out, None, W_U, 2)
    torch.testing.assert_close(direct["lowered_by"], found["lowered_by"])


def test_rare_latents_are_those_below_a_clear_gap() -> None:
    frequent, rare = torch.logspace(-3, -1, 80), torch.logspace(-6, -5.5, 20)
    found = weights.rare_cluster(torch.cat([frequent, rare, torch.zeros(3)]))
    assert found.nonzero().squeeze(1).tolist() == list(range(80, 100))
    assert not weights.rare_cluster(frequent).any()
    assert not weights.rare_cluster(torch.zeros(5)).any()
