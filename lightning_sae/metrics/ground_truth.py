"""How well latents recover known features, accumulated over batches and ranks.

The metrics depend on the decoder, which determines how latents and features are matched: create new
ones for each evaluation, as `ground_truth_metrics` does. Latents must be in the units of the
magnitudes, as `encode` returns them. Edge cases are documented with the functions of the same name
in `lightning_sae.functional.ground_truth`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_sae.checks import require_positive
from lightning_sae.functional.ground_truth import (
    _absorption_compute,
    _absorption_update,
    _activation_mcc_compute,
    _activation_mcc_update,
    _along,
    _detection_update,
    _f1_compute,
    _precision_compute,
    _recall_compute,
    _shrinkage_compute,
    _shrinkage_update,
)
from lightning_sae.functional.matching import best_features, best_latents, duplicates
from lightning_sae.metrics.base import SumsAndCounts, require_last_axis


class _Detection(SumsAndCounts):
    """Firing counts of latents, features and both, the state of the metrics below."""

    is_differentiable = False

    num_both: Tensor
    num_firings: Tensor
    num_present: Tensor
    matching: Tensor

    def __init__(self, matching: Int[Tensor, " d_sae"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("matching", matching, persistent=False)
        for name in ("num_both", "num_firings", "num_present"):
            self.add_count(name, len(matching))

    def update(
        self, f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
    ) -> None:
        """Add a batch of latent activations and the true magnitudes."""
        require_last_axis("f", f, "d_sae", len(self.matching))
        self.accumulate(*_detection_update(f, magnitudes, self.matching))


class DetectionPrecision(_Detection):
    r"""Precision of each latent as a detector: share of its firings where its feature fires.

    .. math:: P_j = \frac{\sum_t [f_{tj} \neq 0][a_{ti} \neq 0]}{\sum_t [f_{tj} \neq 0]},
        \qquad i = \text{matching}_j

    `compute` returns shape `[d_sae]`; NaN for a latent that did not fire.

    Args:
        matching: Feature of each latent, shape `[d_sae]`.
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> metric = DetectionPrecision(torch.tensor([0, 1]))
        >>> f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> metric(f, torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Float[Tensor, " d_sae"]:
        """Shares of all samples seen."""
        return _precision_compute(self.num_both, self.num_firings)


class DetectionRecall(_Detection):
    r"""Recall of each latent as a detector: share of its feature's firings where it fires.

    .. math:: R_j = \frac{\sum_t [f_{tj} \neq 0][a_{ti} \neq 0]}{\sum_t [a_{ti} \neq 0]},
        \qquad i = \text{matching}_j

    `compute` returns shape `[d_sae]`; NaN where the feature did not fire.

    Args:
        matching: Feature of each latent, shape `[d_sae]`.
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> metric = DetectionRecall(torch.tensor([0, 1]))
        >>> f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> metric(f, torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Float[Tensor, " d_sae"]:
        """Shares of all samples seen."""
        return _recall_compute(self.num_both, self.num_present)


class DetectionF1(_Detection):
    r"""Harmonic mean of precision and recall of each latent as a detector of its feature.

    .. math:: F_j = \frac{2 \sum_t [f_{tj} \neq 0][a_{ti} \neq 0]}
        {\sum_t [f_{tj} \neq 0] + \sum_t [a_{ti} \neq 0]}, \qquad i = \text{matching}_j

    `compute` returns shape `[d_sae]`; NaN where neither fired.

    Args:
        matching: Feature of each latent, shape `[d_sae]`.
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> metric = DetectionF1(torch.tensor([0, 1]))
        >>> f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> metric(f, torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
        tensor([0.8000, 0.0000], dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Float[Tensor, " d_sae"]:
        """F1 over all samples seen."""
        return _f1_compute(self.num_both, self.num_firings, self.num_present)


class DuplicateFraction(_Detection):
    r"""Share of alive latents whose matched feature is also that of another alive latent.

    .. math:: \frac{|\{j \in A : \exists k \in A \setminus \{j\},\
        \text{matching}_k = \text{matching}_j\}|}{|A|}, \qquad
        A = \{j : \sum_t [f_{tj} \neq 0] > 0\}

    NaN if no latent fired.

    Args:
        matching: Feature of each latent, shape `[d_sae]`.
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> metric = DuplicateFraction(torch.tensor([0, 0, 1, 1]))
        >>> metric(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.6667, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Float[Tensor, ""]:
        """Share of duplicates among the latents that have fired."""
        alive = self.num_firings > 0
        return duplicates(self.matching, alive).sum().double() / alive.sum()


class Shrinkage(SumsAndCounts):
    r"""Magnitude that each latent implies for its feature, relative to the true one.

    .. math:: s_j = \frac{\sum_{t \in T} f_{tj}\, W_j \cdot d_i}{\sum_{t \in T} a_{ti}}, \qquad
        T = \{t : f_{tj} \neq 0,\ a_{ti} \neq 0\}, \quad i = \text{matching}_j

    `compute` returns shape `[d_sae]`: 1 is unbiased, below 1 is shrinkage, NaN where latent and
    feature never fired together.

    Args:
        W_dec: Decoder rows, shape `[d_sae, d_in]`.
        features: Directions, shape `[n_features, d_in]`.
        matching: Feature of each latent, shape `[d_sae]`.
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> metric = Shrinkage(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
        >>> a = torch.tensor([[2.0, 0.0], [3.0, 0.0], [4.0, 1.0]])
        >>> metric(torch.tensor([[1.5, 0.0], [1.0, 0.0], [0.0, 0.9]]), a)
        tensor([0.5000, 0.9000], dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None

    sum_implied: Tensor
    sum_true: Tensor
    along: Tensor
    matching: Tensor

    def __init__(
        self,
        W_dec: Float[Tensor, "d_sae d_in"],
        features: Float[Tensor, "n_features d_in"],
        matching: Int[Tensor, " d_sae"],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        along = _along(W_dec.detach(), features, matching)
        self.register_buffer("along", along, persistent=False)
        self.register_buffer("matching", matching, persistent=False)
        self.add_sum("sum_implied", len(matching))
        self.add_sum("sum_true", len(matching))

    def update(
        self, f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
    ) -> None:
        """Add a batch of latent activations and the true magnitudes."""
        require_last_axis("f", f, "d_sae", len(self.matching))
        self.accumulate(*_shrinkage_update(f, magnitudes, self.along, self.matching))

    def compute(self) -> Float[Tensor, " d_sae"]:
        """Ratios of the sums over all samples seen."""
        return _shrinkage_compute(self.sum_implied, self.sum_true)


class Absorption(SumsAndCounts):
    r"""Share of samples where parent and child fire on which the parent's latent is silent.

    .. math:: A = \frac{\sum_t [a_{tp} \neq 0][a_{tc} \neq 0][f_{tj} = 0]}
        {\sum_t [a_{tp} \neq 0][a_{tc} \neq 0]}, \qquad j = \text{latents}_p

    `compute` returns shape `[pairs]`; NaN where there was no such sample. `with_child=False` is the
    baseline: the share over samples where the parent fires and the child does not.

    Args:
        pairs: Parent p and child c, shape `[pairs, 2]`.
        latents: Latent of each feature, shape `[n_features]`.
        with_child: Whether to count samples where the child fires, or those where it does not.
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> metric = Absorption(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1]))
        >>> f = torch.tensor([[1.0, 0.0], [0.0, 1.4], [0.5, 1.0]])
        >>> metric(f, torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False

    num_silent_together: Tensor
    num_together: Tensor
    num_silent_alone: Tensor
    num_alone: Tensor
    pairs: Tensor
    latents: Tensor

    def __init__(
        self,
        pairs: Int[Tensor, "pairs 2"],
        latents: Int[Tensor, " n_features"],
        with_child: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.with_child = with_child
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("latents", latents, persistent=False)
        for name in ("num_silent_together", "num_together", "num_silent_alone", "num_alone"):
            self.add_count(name, len(pairs))

    def update(
        self, f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
    ) -> None:
        """Add a batch of latent activations and the true magnitudes."""
        require_last_axis("magnitudes", magnitudes, "n_features", len(self.latents))
        self.accumulate(*_absorption_update(f, magnitudes, self.pairs, self.latents))

    def compute(self) -> Float[Tensor, " pairs"]:
        """Shares of all samples seen."""
        if self.with_child:
            return _absorption_compute(self.num_silent_together, self.num_together)
        return _absorption_compute(self.num_silent_alone, self.num_alone)


class ActivationMCC(SumsAndCounts):
    r"""Mean |correlation| of latents and magnitudes over the best one-to-one matching.

    .. math:: \max_\pi \frac{1}{n} \sum_{(j, i) \in \pi} |\mathrm{corr}_t(f_{tj}, a_{ti})|

    From 0 to 1. The state includes a matrix `[d_sae, n_features]` in float64.

    Args:
        d_sae: Number of latents.
        n_features: Number of features.
        kwargs: As for every `torchmetrics.Metric`.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> metric = ActivationMCC(2, 2)
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> metric(3 * a.flip(1), a)
        tensor(1.0000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True

    sum_f: Tensor
    sum_f_squared: Tensor
    sum_a: Tensor
    sum_a_squared: Tensor
    sum_f_a: Tensor
    num_samples: Tensor

    def __init__(self, d_sae: int, n_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_positive(d_sae=d_sae, n_features=n_features)
        self.d_sae, self.n_features = d_sae, n_features
        for name, size in (("f", d_sae), ("a", n_features)):
            self.add_sum(f"sum_{name}", size)
            self.add_sum(f"sum_{name}_squared", size)
        self.add_sum("sum_f_a", d_sae, n_features)
        self.add_count("num_samples")

    def update(
        self, f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
    ) -> None:
        """Add a batch of latent activations and the true magnitudes."""
        require_last_axis("f", f, "d_sae", self.d_sae)
        require_last_axis("magnitudes", magnitudes, "n_features", self.n_features)
        self.accumulate(*_activation_mcc_update(f, magnitudes))

    def compute(self) -> Float[Tensor, ""]:
        """Mean over the best matching, of all samples seen."""
        return _activation_mcc_compute(
            self.sum_f,
            self.sum_f_squared,
            self.sum_a,
            self.sum_a_squared,
            self.sum_f_a,
            self.num_samples,
        )


def ground_truth_metrics(
    W_dec: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "n_features d_in"],
    pairs: Sequence[tuple[int, int]] = (),
) -> MetricCollection:
    """The metrics of an SAE on toy data, updated by `update(f=f, magnitudes=magnitudes)`.

    Each latent is matched with the feature of largest cosine with its decoder row, and each feature
    of a pair with the latent of largest cosine. `precision`, `recall`, `f1` and `shrinkage` have
    shape `[d_sae]`; `absorption` and `absorption_baseline`, which counts samples where the child
    does not fire, have shape `[pairs]`; `duplicate_fraction` is a scalar. torchmetrics squeezes
    results with one entry to scalars.

    Args:
        W_dec: Decoder rows, shape `[d_sae, d_in]`.
        features: Directions, shape `[n_features, d_in]`.
        pairs: Pairs of parent and child, as `ToyDataModule.pairs`.

    Example:
        >>> from lightning_sae import ReLUSAE, ToyDataModule
        >>> data, sae = ToyDataModule(3, 8, parents={0: [1]}), ReLUSAE(8, 5)
        >>> metrics = ground_truth_metrics(sae.W_dec, data.features, data.pairs)
        >>> sample = data.sample(100, torch.Generator().manual_seed(0))
        >>> metrics.update(f=sae.encode(sample.x), magnitudes=sample.magnitudes)
        >>> metrics.compute()["recall"].shape
        torch.Size([5])
    """
    W_dec = W_dec.detach()
    matching, latents = best_features(W_dec, features), best_latents(W_dec, features)
    metrics: dict[str, Any] = {
        "precision": DetectionPrecision(matching),
        "recall": DetectionRecall(matching),
        "f1": DetectionF1(matching),
        "duplicate_fraction": DuplicateFraction(matching),
        "shrinkage": Shrinkage(W_dec, features, matching),
    }
    if len(pairs):
        ends = torch.tensor(pairs, device=W_dec.device)
        metrics["absorption"] = Absorption(ends, latents)
        metrics["absorption_baseline"] = Absorption(ends, latents, with_child=False)
    return MetricCollection(metrics)
