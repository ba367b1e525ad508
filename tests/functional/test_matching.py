import math

import pytest
import torch

from lightning_sae.functional.geometry import random_unit_rows
from lightning_sae.functional.matching import (
    best_features,
    best_latents,
    cosine_matrix,
    duplicates,
    mean_correlation_coefficient,
    parent_in_child,
)


def test_cosines_are_those_of_each_pair() -> None:
    rows, features = torch.randn(5, 4), torch.randn(3, 4)
    cosines = cosine_matrix(rows, features)
    for j in range(5):
        for i in range(3):
            expected = rows[j] @ features[i] / (rows[j].norm() * features[i].norm())
            assert cosines[j, i].item() == pytest.approx(expected.item(), abs=1e-6)
    assert not cosine_matrix(torch.zeros(1, 4), features).any()


def test_a_perfect_dictionary_in_any_order_and_length_has_coefficient_1() -> None:
    features = random_unit_rows(12, 8)
    order = torch.randperm(12)
    W_dec = features[order] * (0.5 + torch.rand(12, 1))
    assert mean_correlation_coefficient(W_dec, features).item() == pytest.approx(1)
    assert torch.equal(best_features(W_dec, features), order)
    assert torch.equal(best_latents(W_dec, features), order.argsort())


def test_a_backward_row_counts_for_the_coefficient_but_is_no_best_match() -> None:
    features = torch.eye(3)
    W_dec = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert mean_correlation_coefficient(W_dec, features).item() == pytest.approx(1)
    assert best_features(W_dec, features)[0] != 0


def test_a_duplicated_latent_costs_its_share_of_the_coefficient() -> None:
    features = torch.eye(4)
    W_dec = features[[0, 1, 2, 2]]
    assert mean_correlation_coefficient(W_dec, features).item() == pytest.approx(3 / 4)


def test_latents_in_excess_do_not_count() -> None:
    features = torch.eye(5)[:3]
    W_dec = torch.cat([torch.eye(5)[3:], features])
    assert mean_correlation_coefficient(W_dec, features).item() == pytest.approx(1)
    assert mean_correlation_coefficient(features[:1], features).item() == pytest.approx(1)


def test_duplicates_share_their_feature_with_a_living_latent() -> None:
    matching = torch.tensor([0, 0, 1, 2, 2, 2])
    assert duplicates(matching).tolist() == [True, True, False, True, True, True]
    alive = torch.tensor([True, False, True, False, True, True])
    assert duplicates(matching, alive).tolist() == [False, False, False, False, True, True]
    assert not duplicates(matching, torch.zeros(6, dtype=torch.bool)).any()
    assert duplicates(torch.empty(0, dtype=torch.int64)).tolist() == []


def test_an_absorbing_child_points_along_its_parent() -> None:
    features = torch.eye(4)
    clean, absorbed = torch.eye(4)[[2, 0, 1]], torch.eye(4)[[2, 0, 1]]
    absorbed[2] = torch.tensor([1.0, 1.0, 0.0, 0.0]) / math.sqrt(2)  # of the child, feature 1
    pairs = torch.tensor([[0, 1], [0, 2]])
    assert parent_in_child(clean, features, pairs).tolist() == [0, 0]
    found = parent_in_child(absorbed, features, pairs)
    torch.testing.assert_close(found, torch.tensor([1 / math.sqrt(2), 0.0]))


@pytest.mark.usefixtures("unchecked")
def test_another_width_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"equal width but got shapes \(2, 3\) and \(2, 4\): pass"):
        cosine_matrix(torch.ones(2, 3), torch.ones(2, 4))
