r"""Match latents with known features by their directions.

:math:`W_j` is the decoder row of latent :math:`j` of `d_sae`, :math:`d_i` the direction of feature
:math:`i` of `n_features`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sae.functional.assignment import optimal_matching
from lightning_sae.functional.geometry import unit_rows


def cosine_matrix(
    rows: Float[Tensor, "d_sae d_in"], features: Float[Tensor, "n_features d_in"]
) -> Float[Tensor, "d_sae n_features"]:
    """Cosine of each latent's row with each feature; zero rows have cosine 0.

    Args:
        rows: Decoder rows `W_dec`, or encoder columns `W_enc.T`, shape `[d_sae, d_in]`.
        features: Directions, shape `[n_features, d_in]`.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> import torch
        >>> cosine_matrix(torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.eye(2))
        tensor([[ 0.6000,  0.8000],
                [ 0.0000, -1.0000]])
    """
    if rows.shape[-1] != features.shape[-1]:
        raise ValueError(
            "Expected arguments `rows` and `features` to have equal width but got shapes "
            f"{tuple(rows.shape)} and {tuple(features.shape)}: pass `W_dec` or `W_enc.T`."
        )
    return unit_rows(rows) @ unit_rows(features.to(rows)).T


def best_features(
    W_dec: Float[Tensor, "d_sae d_in"], features: Float[Tensor, "n_features d_in"]
) -> Int[Tensor, " d_sae"]:
    """The feature of largest cosine with each decoder row; latents may share a feature.

    Example:
        >>> import torch
        >>> best_features(torch.tensor([[0.6, 0.8], [-1.0, 0.1], [0.0, 2.0]]), torch.eye(2))
        tensor([1, 1, 1])
    """
    return cosine_matrix(W_dec, features).argmax(1)


def best_latents(
    W_dec: Float[Tensor, "d_sae d_in"], features: Float[Tensor, "n_features d_in"]
) -> Int[Tensor, " n_features"]:
    """The latent whose decoder row has the largest cosine with each feature.

    Example:
        >>> import torch
        >>> best_latents(torch.tensor([[0.6, 0.8], [-1.0, 0.1], [0.0, 2.0]]), torch.eye(2))
        tensor([0, 2])
    """
    return cosine_matrix(W_dec, features).argmax(0)


def mean_correlation_coefficient(
    W_dec: Float[Tensor, "d_sae d_in"], features: Float[Tensor, "n_features d_in"]
) -> Float[Tensor, ""]:
    r"""Mean |cosine| of decoder rows and features over the best one-to-one matching.

    .. math:: \max_\pi \frac{1}{n} \sum_{(j, i) \in \pi}
        \left|\frac{W_j \cdot d_i}{\|W_j\| \|d_i\|}\right|

    :math:`\pi` pairs latents with features, each at most once, and :math:`n` is the smaller of
    `d_sae` and `n_features`: surplus latents or features do not count. From 0 to 1; 1 for a
    perfect dictionary in any order. Source: O'Neill et al., "Compute Optimal
    Inference and Provable Amortisation Gap in Sparse Autoencoders" (2024).

    Args:
        W_dec: Decoder rows, shape `[d_sae, d_in]`.
        features: Directions, shape `[n_features, d_in]`.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> import torch
        >>> mean_correlation_coefficient(torch.tensor([[0.0, 1.0], [0.6, 0.8]]), torch.eye(2))
        tensor(0.8000, dtype=torch.float64)
    """
    return matched_mean(cosine_matrix(W_dec.double(), features))


def matched_mean(similarity: Float[Tensor, "d_sae n_features"]) -> Float[Tensor, ""]:
    """Mean |similarity| over the one-to-one matching that maximizes it."""
    size = similarity.abs()
    return size[optimal_matching(size)].mean()


def duplicates(
    matching: Int[Tensor, " d_sae"], alive: Bool[Tensor, " d_sae"] | None = None
) -> Bool[Tensor, " d_sae"]:
    """Which latents share their matched feature with another latent.

    Args:
        matching: Feature of each latent, shape `[d_sae]`.
        alive: Latents to consider, by default all. Others are not duplicates of any latent.

    Example:
        >>> import torch
        >>> duplicates(torch.tensor([3, 0, 3, 1]))
        tensor([ True, False,  True, False])
    """
    alive = torch.ones_like(matching, dtype=torch.bool) if alive is None else alive
    if len(matching) == 0:
        return alive
    holders = torch.bincount(matching[alive], minlength=int(matching.max()) + 1)
    return alive & (holders[matching] > 1)


def parent_in_child(
    W_dec: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "n_features d_in"],
    pairs: Int[Tensor, "pairs 2"],
) -> Float[Tensor, " pairs"]:
    r"""Cosine of the decoder row of a child's latent with the parent's direction.

    For orthogonal features it is 0 without absorption, and :math:`1 / \sqrt 2` if the latent has
    fully absorbed a parent of equal magnitude. Latents are matched by :func:`best_latents`.

    Args:
        W_dec: Decoder rows, shape `[d_sae, d_in]`.
        features: Directions, shape `[n_features, d_in]`.
        pairs: Parents and children, shape `[pairs, 2]`.

    Returns:
        Cosines, shape `[pairs]`.

    Example:
        >>> import torch
        >>> W_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> parent_in_child(W_dec, torch.eye(2), torch.tensor([[0, 1]]))
        tensor([0.6000])
    """
    cosines = cosine_matrix(W_dec, features)
    parents, children = pairs.unbind(1)
    return cosines[cosines.argmax(0)[children], parents]
