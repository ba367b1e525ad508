"""Sparse probes on latents of which the answer is known."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from lightning_sae.analysis.evaluation.probing import (
    balanced_task,
    class_difference,
    full_probe,
    sparse_probes,
)
from lightning_sae.analysis.evaluation.sample import means_of_blocks


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_task_has_equally_many_of_both_classes_in_either_half() -> None:
    labels = torch.tensor([1] * 30 + [0] * 100 + [-1] * 10)
    tested = torch.arange(140) % 3 == 0
    task = balanced_task(labels, tested, generator(), {"train": 8, "test": 50})
    for rows, values, mask, n in (
        (task.train, task.train_labels, ~tested, 8),
        (task.test, task.test_labels, tested, 10),
    ):
        assert values.tolist() == [0] * n + [1] * n == labels[rows].tolist()
        assert mask[rows].all()
        assert len(set(rows.tolist())) == 2 * n


def test_class_differences_are_those_of_the_means() -> None:
    rows = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 6.0]])
    labels = np.array([1, 1, 0])
    assert class_difference(rows, labels).tolist() == [2.0, -4.0]
    assert class_difference(csr_matrix(rows), labels).tolist() == [2.0, -4.0]


@pytest.mark.parametrize("sparse", [False, True])
def test_latents_that_are_the_property_are_found_and_suffice(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    part = rng.integers(0, 2, 400)  # of the property, either of two latents tells half
    f = (rng.random((400, 30)) < 0.2) * rng.random((400, 30))
    f[:, 7], f[:, 12] = labels * part, labels * (1 - part)
    matrix = csr_matrix(f) if sparse else f
    task = balanced_task(torch.from_numpy(labels), torch.arange(400) % 2 == 0, generator())
    found = sparse_probes(matrix, task)
    assert found[1] == pytest.approx(0.75, abs=0.05)
    assert found[2] == found[5] == 1.0
    assert full_probe(f, task) > 0.95


def test_latents_without_the_property_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 4000))
    task = balanced_task(labels, torch.arange(4000) % 2 == 0, generator())
    found = sparse_probes(rng.random((4000, 20)), task)
    assert all(accuracy == pytest.approx(0.5, abs=0.05) for accuracy in found.values())


@pytest.mark.parametrize("sparse", [False, True])
def test_means_of_blocks_are_a_loops(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    rows, block = rng.random((20, 3)), torch.arange(20) // 7 * 2
    found = means_of_blocks(csr_matrix(rows) if sparse else rows, block, block.unique())
    for place, number in enumerate(block.unique()):
        expected = rows[(block == number).numpy()].mean(0)
        np.testing.assert_allclose(found[place], expected)
