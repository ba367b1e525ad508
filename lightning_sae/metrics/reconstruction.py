"""How well reconstructions match activations, accumulated over batches and ranks.

Results refer to the space of the given tensors: raw activations if raw ones are given. Edge cases
are documented with the functions of the same name in `lightning_sae.functional`.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.functional.reconstruction import (
    _cosine_similarity_compute,
    _cosine_similarity_update,
    _fvu_compute,
    _fvu_update,
    _l2_ratio_compute,
    _l2_ratio_update,
    _mse_compute,
    _mse_update,
    _relative_reconstruction_bias_compute,
    _relative_reconstruction_bias_update,
)
from lightning_sae.metrics.base import SumsAndCounts, require_last_axis


class MSE(SumsAndCounts):
    r"""Squared error, summed over `d_in` and averaged over tokens.

    .. math:: \frac{1}{T} \sum_t \|x_t - \hat x_t\|^2

    :math:`x_t` and :math:`\hat x_t` are activation and reconstruction at token :math:`t` of
    :math:`T`. In squared units of the activations.

    Args:
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = MSE()
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]]))
        >>> metric.update(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False

    squared_error: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("squared_error")
        self.add_count("num_tokens")

    def update(self, x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> None:
        """Add a batch of activations and their reconstructions."""
        self.accumulate(*_mse_update(x, x_hat))

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all tokens seen."""
        return _mse_compute(self.squared_error, self.num_tokens)


class FVU(SumsAndCounts):
    r"""Fraction of variance unexplained.

    .. math:: \frac{\sum_t \|x_t - \hat x_t\|^2}{\sum_t \|x_t - \bar x\|^2},
        \qquad \bar x = \frac{1}{T} \sum_t x_t

    :math:`x_t` and :math:`\hat x_t` are activation and reconstruction at token :math:`t` of
    :math:`T`. The mean :math:`\bar x` is over all tokens seen, so the result does not depend on the
    batches. Dimensionless: 0 is perfect, 1 is the value for the constant mean.

    Args:
        d_in: Width of the activations.
        kwargs: As for every `torchmetrics.Metric`.

    Raises:
        ValueError: If `d_in` is not positive.

    Example:
        >>> import torch
        >>> metric = FVU(d_in=2)
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]]))
        >>> metric.update(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        >>> metric.compute()
        tensor(0.7692, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better: bool | None = False

    squared_error: Tensor
    sum_x_squared: Tensor
    sum_x: Tensor
    num_tokens: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_positive(d_in=d_in)
        self.d_in = d_in
        self.add_sum("squared_error")
        self.add_sum("sum_x_squared")
        self.add_sum("sum_x", d_in)
        self.add_count("num_tokens")

    def update(self, x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> None:
        """Add a batch of activations and their reconstructions."""
        require_last_axis("x", x, "d_in", self.d_in)
        self.accumulate(*_fvu_update(x, x_hat))

    def compute(self) -> Float[Tensor, ""]:
        """Ratio of the sums over all tokens seen."""
        return _fvu_compute(self.squared_error, self.sum_x_squared, self.sum_x, self.num_tokens)


class ExplainedVariance(FVU):
    r"""Fraction of variance explained, one minus :class:`FVU`, with the same states.

    .. math:: 1 - \frac{\sum_t \|x_t - \hat x_t\|^2}{\sum_t \|x_t - \bar x\|^2}

    Symbols as in :class:`FVU`. Dimensionless: 1 is perfect, 0 is the value for the constant mean.

    Args:
        d_in: Width of the activations.
        kwargs: As for every `torchmetrics.Metric`.

    Raises:
        ValueError: If `d_in` is not positive.

    Example:
        >>> import torch
        >>> metric = ExplainedVariance(d_in=2)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> metric(x, torch.tensor([[3.0, 2.0], [1.0, 2.0]]))
        tensor(0.2308, dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Float[Tensor, ""]:
        """One minus the ratio of the sums over all tokens seen."""
        return 1 - super().compute()


class L2Ratio(SumsAndCounts):
    r"""Norm of the reconstruction relative to that of the activation, averaged over tokens.

    .. math:: \frac{1}{T} \sum_t \frac{\|\hat x_t\|}{\|x_t\|}

    :math:`x_t` and :math:`\hat x_t` are activation and reconstruction at token :math:`t` of
    :math:`T`. Tokens with :math:`\|x_t\| = 0` are ignored. Dimensionless; both shrinkage and wrong
    directions lower it, see :class:`RelativeReconstructionBias`.

    Args:
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = L2Ratio()
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> metric(x, torch.tensor([[0.0, 4.0], [0.0, 1.0]]))
        tensor(0.6500, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None

    sum_norm_ratio: Tensor
    num_nonzero_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("sum_norm_ratio")
        self.add_count("num_nonzero_tokens")

    def update(self, x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> None:
        """Add a batch of activations and their reconstructions."""
        self.accumulate(*_l2_ratio_update(x, x_hat))

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all tokens seen with nonzero activations."""
        return _l2_ratio_compute(self.sum_norm_ratio, self.num_nonzero_tokens)


class RelativeReconstructionBias(SumsAndCounts):
    r"""Factor by which reconstructions are too long: dividing by it minimizes the error.

    .. math:: \gamma = \arg\min_{\gamma'} \sum_t \|\hat x_t / \gamma' - x_t\|^2
        = \frac{\sum_t \|\hat x_t\|^2}{\sum_t x_t \cdot \hat x_t}

    :math:`x_t` and :math:`\hat x_t` are activation and reconstruction at token :math:`t`.
    Dimensionless: 1 means no shrinkage, less than 1 shrinkage; :math:`\hat x = \alpha x` gives
    :math:`\alpha`. Source: Rajamanoharan et al., "Improving Dictionary Learning with Gated Sparse
    Autoencoders" (2024), in the corrected form.

    Args:
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RelativeReconstructionBias()
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> metric(x, 0.5 * x)
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None

    sum_x_hat_squared: Tensor
    sum_inner_product: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("sum_x_hat_squared")
        self.add_sum("sum_inner_product")

    def update(self, x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> None:
        """Add a batch of activations and their reconstructions."""
        self.accumulate(*_relative_reconstruction_bias_update(x, x_hat))

    def compute(self) -> Float[Tensor, ""]:
        """Ratio of the sums over all tokens seen."""
        return _relative_reconstruction_bias_compute(self.sum_x_hat_squared, self.sum_inner_product)


class CosineSimilarity(SumsAndCounts):
    r"""Cosine of the angle between activation and reconstruction, averaged over tokens.

    .. math:: \frac{1}{T} \sum_t \frac{x_t \cdot \hat x_t}{\|x_t\| \, \|\hat x_t\|}

    :math:`x_t` and :math:`\hat x_t` are activation and reconstruction at token :math:`t` of
    :math:`T`. Tokens with :math:`\|x_t\| = 0` are ignored; a zero reconstruction counts as cosine
    0. From -1 to 1.

    Args:
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = CosineSimilarity()
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> metric(x, torch.tensor([[0.0, 4.0], [0.0, 1.0]]))
        tensor(0.9000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True

    sum_cosine: Tensor
    num_nonzero_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("sum_cosine")
        self.add_count("num_nonzero_tokens")

    def update(self, x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> None:
        """Add a batch of activations and their reconstructions."""
        self.accumulate(*_cosine_similarity_update(x, x_hat))

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all tokens seen with nonzero activations."""
        return _cosine_similarity_compute(self.sum_cosine, self.num_nonzero_tokens)
