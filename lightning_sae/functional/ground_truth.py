r"""How well latents recover known features, as in toy data.

Here :math:`f_{tj}` is latent :math:`j` of `d_sae` at sample :math:`t`, :math:`a_{ti}` the
magnitude of feature :math:`i` of `n_features`, :math:`W_j` the latent's decoder row and
:math:`d_i` the feature's direction. A latent or feature fires where its value is nonzero. All
leading axes are sample axes. `matching` [d_sae] gives the feature that each latent is compared
with, usually the one of largest cosine with its decoder row (:func:`.matching.best_features`);
several latents may share a feature.

Each metric has three functions: `_x_update` computes sums and counts from tensors, `_x_compute`
computes the result from those, and the public function calls both.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sae.functional.geometry import unit_rows
from lightning_sae.functional.matching import matched_mean

PerLatent = Int[Tensor, " d_sae"]


def _detection_update(
    f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"], matching: PerLatent
) -> tuple[PerLatent, PerLatent, PerLatent]:
    latent, feature = _matched(f, magnitudes, matching)
    fires, present = latent != 0, feature != 0
    return (fires & present).sum(0), fires.sum(0), present.sum(0)


def _matched(
    f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"], matching: PerLatent
) -> tuple[Float[Tensor, "samples d_sae"], Float[Tensor, "samples d_sae"]]:
    """Latents and their matched features, with the sample axes flattened."""
    _check_samples(f, magnitudes)
    return f.flatten(0, -2), magnitudes.flatten(0, -2)[:, matching]


def _check_samples(
    f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
) -> None:
    if f.ndim < 2 or f.shape[:-1] != magnitudes.shape[:-1]:
        raise ValueError(
            "Expected arguments `f` [..., d_sae] and `magnitudes` [..., n_features] to have the "
            f"same leading axes but got shapes {tuple(f.shape)} and {tuple(magnitudes.shape)}."
        )


def _precision_compute(num_both: PerLatent, num_firings: PerLatent) -> Float[Tensor, " d_sae"]:
    return num_both.double() / num_firings


def detection_precision(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    matching: Int[Tensor, " d_sae"],
) -> Float[Tensor, " d_sae"]:
    r"""Precision of each latent as a detector: share of its firings where its feature fires.

    .. math:: P_j = \frac{\sum_t [f_{tj} \neq 0][a_{ti} \neq 0]}{\sum_t [f_{tj} \neq 0]},
        \qquad i = \text{matching}_j

    Args:
        f: Latent activations, shape `[..., d_sae]`.
        magnitudes: True magnitudes, shape `[..., n_features]`.
        matching: Feature of each latent, shape `[d_sae]`.

    Returns:
        Precision in float64, shape `[d_sae]`; NaN for a latent that does not fire.

    Raises:
        ValueError: If the leading axes of `f` and `magnitudes` differ.

    Example:
        >>> import torch
        >>> f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
        >>> detection_precision(f, a, torch.tensor([0, 1]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    num_both, num_firings, _ = _detection_update(f, magnitudes, matching)
    return _precision_compute(num_both, num_firings)


def _recall_compute(num_both: PerLatent, num_present: PerLatent) -> Float[Tensor, " d_sae"]:
    return num_both.double() / num_present


def detection_recall(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    matching: Int[Tensor, " d_sae"],
) -> Float[Tensor, " d_sae"]:
    r"""Recall of each latent as a detector: share of its feature's firings where it fires.

    .. math:: R_j = \frac{\sum_t [f_{tj} \neq 0][a_{ti} \neq 0]}{\sum_t [a_{ti} \neq 0]},
        \qquad i = \text{matching}_j

    Args:
        f: Latent activations, shape `[..., d_sae]`.
        magnitudes: True magnitudes, shape `[..., n_features]`.
        matching: Feature of each latent, shape `[d_sae]`.

    Returns:
        Recall in float64, shape `[d_sae]`; NaN where the feature does not fire.

    Raises:
        ValueError: If the leading axes of `f` and `magnitudes` differ.

    Example:
        >>> import torch
        >>> f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
        >>> detection_recall(f, a, torch.tensor([0, 1]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    num_both, _, num_present = _detection_update(f, magnitudes, matching)
    return _recall_compute(num_both, num_present)


def _f1_compute(
    num_both: PerLatent, num_firings: PerLatent, num_present: PerLatent
) -> Float[Tensor, " d_sae"]:
    return 2 * num_both.double() / (num_firings + num_present)


def detection_f1(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    matching: Int[Tensor, " d_sae"],
) -> Float[Tensor, " d_sae"]:
    r"""Harmonic mean of :func:`detection_precision` and :func:`detection_recall`.

    .. math:: F_j = \frac{2 \sum_t [f_{tj} \neq 0][a_{ti} \neq 0]}
        {\sum_t [f_{tj} \neq 0] + \sum_t [a_{ti} \neq 0]}, \qquad i = \text{matching}_j

    Args:
        f: Latent activations, shape `[..., d_sae]`.
        magnitudes: True magnitudes, shape `[..., n_features]`.
        matching: Feature of each latent, shape `[d_sae]`.

    Returns:
        F1 in float64, shape `[d_sae]`; 0 for a dead latent whose feature fires, NaN where neither
        fires.

    Raises:
        ValueError: If the leading axes of `f` and `magnitudes` differ.

    Example:
        >>> import torch
        >>> f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        >>> detection_f1(f, a, torch.tensor([0, 1]))
        tensor([0.8000, 0.0000], dtype=torch.float64)
    """
    return _f1_compute(*_detection_update(f, magnitudes, matching))


# Magnitudes.


def _shrinkage_update(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    along: Float[Tensor, " d_sae"],
    matching: PerLatent,
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    latent, feature = _matched(f, magnitudes, matching)
    both = (latent != 0) & (feature != 0)
    implied, true = latent.double() * both, feature.double() * both
    return implied.sum(0) * along.double(), true.sum(0)


def _along(W_dec: Tensor, features: Tensor, matching: PerLatent) -> Float[Tensor, " d_sae"]:
    """Component of each decoder row along its matched feature."""
    return (W_dec.double() * unit_rows(features.to(W_dec).double())[matching]).sum(-1)


def _shrinkage_compute(
    sum_implied: Float[Tensor, " d_sae"], sum_true: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    return sum_implied / sum_true


def shrinkage(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    W_dec: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "n_features d_in"],
    matching: Int[Tensor, " d_sae"],
) -> Float[Tensor, " d_sae"]:
    r"""Magnitude that each latent implies for its feature, relative to the true one.

    .. math:: s_j = \frac{\sum_{t \in T} f_{tj}\, W_j \cdot d_i}{\sum_{t \in T} a_{ti}}, \qquad
        T = \{t : f_{tj} \neq 0,\ a_{ti} \neq 0\}, \quad i = \text{matching}_j

    Dimensionless: 1 is unbiased, below 1 is shrinkage. It is the ratio of the means over the
    samples where both fire; missed firings are measured by :func:`detection_recall`. A feature of
    magnitude g that an L1 penalty of weight :math:`\lambda` shrinks to :math:`g - \lambda / 2`
    gives :math:`1 - \lambda / 2g`.

    Args:
        f: Latent activations, shape `[..., d_sae]`, in the units of `magnitudes`.
        magnitudes: True magnitudes, shape `[..., n_features]`.
        W_dec: Decoder rows, shape `[d_sae, d_in]`.
        features: Directions, shape `[n_features, d_in]`.
        matching: Feature of each latent, shape `[d_sae]`.

    Returns:
        Ratios in float64, shape `[d_sae]`; NaN where the two never fire together.

    Raises:
        ValueError: If the leading axes of `f` and `magnitudes` differ.

    Example:
        >>> import torch
        >>> f, a = torch.tensor([[1.5], [1.0], [0.0]]), torch.tensor([[2.0], [3.0], [4.0]])
        >>> shrinkage(f, a, torch.tensor([[1.0]]), torch.tensor([[1.0]]), torch.tensor([0]))
        tensor([0.5000], dtype=torch.float64)
    """
    along = _along(W_dec, features, matching)
    return _shrinkage_compute(*_shrinkage_update(f, magnitudes, along, matching))


# Absorption.

PerPair = Int[Tensor, " pairs"]


def _absorption_update(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    pairs: Int[Tensor, "pairs 2"],
    latents: Int[Tensor, " n_features"],
) -> tuple[PerPair, PerPair, PerPair, PerPair]:
    _check_samples(f, magnitudes)
    parents, children = pairs.unbind(1)
    fires = magnitudes.flatten(0, -2) != 0
    parent, child = fires[:, parents], fires[:, children]
    silent = f.flatten(0, -2)[:, latents[parents]] == 0
    together, alone = parent & child, parent & ~child
    counted = (together & silent, together, alone & silent, alone)
    return tuple(mask.sum(0) for mask in counted)  # type: ignore[return-value]


def _absorption_compute(silent: PerPair, num_samples: PerPair) -> Float[Tensor, " pairs"]:
    return silent.double() / num_samples


def absorption(
    f: Float[Tensor, "... d_sae"],
    magnitudes: Float[Tensor, "... n_features"],
    pairs: Int[Tensor, "pairs 2"],
    latents: Int[Tensor, " n_features"],
    with_child: bool = True,
) -> Float[Tensor, " pairs"]:
    r"""Share of samples where parent and child fire on which the parent's latent is silent.

    .. math:: A = \frac{\sum_t [a_{tp} \neq 0][a_{tc} \neq 0][f_{tj} = 0]}
        {\sum_t [a_{tp} \neq 0][a_{tc} \neq 0]}, \qquad j = \text{latents}_p

    A latent that never fires also gives 1, without absorption. `with_child=False` is the baseline:
    the same share over samples where the parent fires and the child does not.
    :func:`.matching.parent_in_child` measures the other half of absorption. Source: Chanin et al.,
    "A is for Absorption" (2024), whose measure for unknown features has more conditions.

    Args:
        f: Latent activations, shape `[..., d_sae]`.
        magnitudes: True magnitudes, shape `[..., n_features]`.
        pairs: Parent p and child c, shape `[pairs, 2]`.
        latents: Latent of each feature, shape `[n_features]`, usually from
            :func:`.matching.best_latents`.
        with_child: Whether to count samples where the child fires, or those where it does not.

    Returns:
        Shares in float64, shape `[pairs]`; NaN where there is no such sample.

    Raises:
        ValueError: If the leading axes of `f` and `magnitudes` differ.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
        >>> f = torch.tensor([[1.0, 0.0], [0.0, 1.4], [0.5, 1.0]])
        >>> absorption(f, a, torch.tensor([[0, 1]]), torch.tensor([0, 1]))
        tensor([0.5000], dtype=torch.float64)
    """
    counts = _absorption_update(f, magnitudes, pairs, latents)
    return _absorption_compute(*(counts[:2] if with_child else counts[2:]))


# Activations.


def _activation_mcc_update(
    f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    _check_samples(f, magnitudes)
    f, a = f.flatten(0, -2).double(), magnitudes.flatten(0, -2).double()
    return f.sum(0), f.square().sum(0), a.sum(0), a.square().sum(0), f.T @ a, len(f)


def _activation_mcc_compute(
    sum_f: Float[Tensor, " d_sae"],
    sum_f_squared: Float[Tensor, " d_sae"],
    sum_a: Float[Tensor, " n_features"],
    sum_a_squared: Float[Tensor, " n_features"],
    sum_f_a: Float[Tensor, "d_sae n_features"],
    num_samples: int | Int[Tensor, ""],
) -> Float[Tensor, ""]:
    if num_samples == 0:
        return sum_f_a.new_full((), torch.nan)
    covariance = sum_f_a - torch.outer(sum_f, sum_a) / num_samples
    spread_f = (sum_f_squared - sum_f.square() / num_samples).clamp_min(0).sqrt()
    spread_a = (sum_a_squared - sum_a.square() / num_samples).clamp_min(0).sqrt()
    spread = torch.outer(spread_f, spread_a)
    return matched_mean(torch.where(spread > 0, covariance / spread, 0.0))


def activation_mcc(
    f: Float[Tensor, "... d_sae"], magnitudes: Float[Tensor, "... n_features"]
) -> Float[Tensor, ""]:
    r"""Mean |correlation| of latents and magnitudes over the best one-to-one matching.

    .. math:: \max_\pi \frac{1}{n} \sum_{(j, i) \in \pi} |\mathrm{corr}_t(f_{tj}, a_{ti})|

    Like :func:`.matching.mean_correlation_coefficient`, with Pearson's correlation over samples
    instead of the decoder's cosine: it is 1 if latents equal the magnitudes up to order and scale,
    whatever the decoder. Constant latents or features have correlation 0. Costs a float64 matrix
    `[d_sae, n_features]` and a product of that size per batch. Source: Hyvarinen and Morioka,
    "Unsupervised Feature Extraction by Time-Contrastive Learning and Nonlinear ICA" (2016).

    Args:
        f: Latent activations, shape `[..., d_sae]`.
        magnitudes: True magnitudes, shape `[..., n_features]`.

    Returns:
        A float64 scalar from 0 to 1; NaN for no samples.

    Raises:
        ValueError: If the leading axes of `f` and `magnitudes` differ.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> activation_mcc(3 * a.flip(1), a)
        tensor(1.0000, dtype=torch.float64)
    """
    return _activation_mcc_compute(*_activation_mcc_update(f, magnitudes))
