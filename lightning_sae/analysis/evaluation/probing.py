r"""Sparse probing: can a few latents tell whether a token or a context has a property?

Gurnee et al., *Finding neurons in a haystack: case studies with sparse probing* (2023), as SAEBench
(Karvonen et al. 2025, "sparse probing") applies it to SAEs. On the training half, the k latents
with the largest difference of class means are selected,

.. math:: \arg\max_j \left| E[f_j \mid y = 1] - E[f_j \mid y = 0] \right|,

and a logistic regression on these k is scored on the other half, which consists of other documents.
Both classes are equally frequent in each half, so chance is .5. The baselines are the same probe on
neurons, and a probe on the whole activation as an upper bound.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

WIDTHS = (1, 2, 5)
PER_CLASS = {"train": 1000, "test": 500}


class Task(NamedTuple):
    """Rows to train and test a probe on, and whether each has the property."""

    train: Any
    test: Any
    train_labels: Any
    test_labels: Any


def balanced_task(
    labels: Int[Tensor, " n"],
    tested: Bool[Tensor, " n"],
    generator: torch.Generator,
    per_class: dict[str, int] | None = None,
) -> Task:
    """Draw equally many rows of both classes in each half.

    Args:
        labels: 1, 0, or -1 for rows that are left out.
        tested: Mask of the rows in the test half.
        generator: Draws the rows.
        per_class: Maximum rows of a class, in `train` and in `test`.
    """
    per_class = PER_CLASS if per_class is None else per_class
    rows, values = {}, {}
    for half, mask in (("train", ~tested), ("test", tested)):
        classes = [(mask & (labels == value)).nonzero().squeeze(1) for value in (0, 1)]
        n = min(per_class[half], *(len(members) for members in classes))
        drawn = [m[torch.randperm(len(m), generator=generator)[:n]] for m in classes]
        rows[half] = torch.cat(drawn).numpy()
        values[half] = np.repeat([0, 1], n)
    return Task(rows["train"], rows["test"], values["train"], values["test"])


def class_difference(rows: Any, labels: Any) -> Any:
    """Mean over rows with the property minus mean over rows without, [d]."""
    means = [np.asarray(rows[labels == value].mean(axis=0)).ravel() for value in (1, 0)]
    return means[0] - means[1]


def probe_accuracy(train: Any, train_labels: Any, test: Any, test_labels: Any) -> float:
    """Accuracy of a logistic regression on columns standardised to mean 0 and variance 1."""
    mean, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    # Single-precision products of some BLAS versions report invalid values among finite numbers.
    with np.errstate(invalid="ignore"):
        probe = LogisticRegression(max_iter=2000).fit((train - mean) / scale, train_labels)
        assert np.isfinite(probe.coef_).all()
        return float(probe.score((test - mean) / scale, test_labels))


def sparse_probes(matrix: Any, task: Task, widths: tuple[int, ...] = WIDTHS) -> dict[int, float]:
    """Accuracy of probes on the k columns whose class means differ most, by k.

    Args:
        matrix: Latents or neurons [n, d], sparse or not.
        task: The rows.
        widths: Values of k.
    """
    train, test = matrix[task.train], matrix[task.test]
    order = np.argsort(-np.abs(class_difference(train, task.train_labels)), kind="stable")
    return {
        k: probe_accuracy(
            dense(train[:, order[:k]]),
            task.train_labels,
            dense(test[:, order[:k]]),
            task.test_labels,
        )
        for k in widths
    }


def full_probe(x: Any, task: Task) -> float:
    """Accuracy of a probe on all coordinates of the activation."""
    return probe_accuracy(x[task.train], task.train_labels, x[task.test], task.test_labels)


def dense(matrix: Any) -> Any:
    """A matrix as an array."""
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
