r"""Redundancy: latents with nearly equal directions, and latents that always fire together."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix
from torch import Tensor

from lightning_sae.analysis.weights import nearest

DUPLICATE, TOGETHER = 0.9, 0.9
FEWEST_FIRINGS = 10
MOST_PAIRS = 10**8


@torch.no_grad()
def duplicate_share(W_dec: Float[Tensor, "d_sae d_in"], alive: Bool[Tensor, " d_sae"]) -> float:
    r"""Share of the alive latents that have a near duplicate among them.

    .. math:: \max_{i \ne j} \frac{W_i \cdot W_j}{\|W_i\| \|W_j\|} \ge .9

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.0, 1.0]])
        >>> duplicate_share(rows, torch.tensor([True, True, True, False]))
        0.6666666666666666
    """
    rows = W_dec.detach().cpu()[alive]
    if len(rows) < 2:
        return 0.0
    return float((nearest(rows, 1)[1][:, 0] >= DUPLICATE).double().mean())


def together_share(latents: csr_matrix) -> float:
    r"""Share of latents that nearly always fire together with another one.

    Latent :math:`i` fires on the tokens :math:`A_i`. It counts if some :math:`j` has a Jaccard
    index :math:`|A_i \cap A_j| / |A_i \cup A_j| \ge .9` with it. Latents that fire less than ten
    times in the text are left out; NaN if all are. A text with more than 10^8 pairs of firings is
    cut.

    Args:
        latents: Sparse matrix [tokens, d_sae].
    """
    per_token = np.diff(latents.indptr).astype(np.int64)
    n = int(np.searchsorted((per_token**2).cumsum(), MOST_PAIRS, side="right"))
    fires = (latents[: max(n, 1)] > 0).astype(np.int32).tocsc()
    counts = np.asarray(fires.sum(0)).ravel()
    enough = counts >= FEWEST_FIRINGS
    if not enough.any():
        return float("nan")
    fires, counts = fires[:, enough], counts[enough]
    both = (fires.T @ fires).tocoo()
    different = both.row != both.col
    row, column, shared = both.row[different], both.col[different], both.data[different]
    jaccard = shared / (counts[row] + counts[column] - shared)
    return float(len(np.unique(row[jaccard >= TOGETHER])) / len(counts))
