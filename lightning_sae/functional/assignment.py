"""The best one-to-one matching of rows and columns."""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def optimal_matching(
    similarity: Float[Tensor, "rows columns"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Pair rows with columns, each at most once, so that the summed similarity is largest.

    Args:
        similarity: Similarity of each row and column, shape `[rows, columns]`, finite.

    Returns:
        Row indices in increasing order and the column of each, `min(rows, columns)` pairs.

    Raises:
        ValueError: If an entry is not finite.

    Example:
        >>> optimal_matching(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
        (tensor([0, 1]), tensor([1, 0]))
    """
    if not similarity.isfinite().all():
        raise ValueError(
            "Expected argument `similarity` to be finite but got NaN or infinite entries."
        )
    pairs = linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)
    rows, columns = (torch.as_tensor(indices).to(similarity.device) for indices in pairs)
    return rows, columns
