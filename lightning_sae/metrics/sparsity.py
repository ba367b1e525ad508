"""How many latents fire and how often, accumulated over batches and ranks.

A latent fires on a token if its value is nonzero; raw and scaled spaces give the same results. Edge
cases are documented with the functions of the same name in `lightning_sae.functional`.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.functional.sparsity import (
    _check_threshold,
    _dead_fraction_compute,
    _feature_frequency_compute,
    _feature_frequency_update,
    _frequency_below_compute,
    _l0_compute,
    _l0_update,
)
from lightning_sae.metrics.base import SumsAndCounts, require_last_axis


class L0(SumsAndCounts):
    r"""Mean number of latents that fire on a token.

    .. math:: \frac{1}{T} \sum_t \sum_j [f_{tj} \neq 0]

    :math:`f_{tj}` is latent :math:`j` at token :math:`t` of :math:`T`.

    Args:
        kwargs: As for every `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = L0()
        >>> metric.update(torch.tensor([[0.0, 2.0, 0.5]]))
        >>> metric.update(torch.tensor([[0.0, 0.0, 1.0]]))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None

    num_active: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_count("num_active")
        self.add_count("num_tokens")

    def update(self, f: Float[Tensor, "... d_sae"]) -> None:
        """Add a batch of latent activations."""
        self.accumulate(*_l0_update(f))

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all tokens seen."""
        return _l0_compute(self.num_active, self.num_tokens)


class _FiringCounts(SumsAndCounts):
    """Number of tokens on which each latent fired, the state of the metrics below."""

    is_differentiable = False

    num_firings: Tensor
    num_tokens: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_positive(d_sae=d_sae)
        self.d_sae = d_sae
        self.add_count("num_firings", d_sae)
        self.add_count("num_tokens")

    def update(self, f: Float[Tensor, "... d_sae"]) -> None:
        """Add a batch of latent activations."""
        require_last_axis("f", f, "d_sae", self.d_sae)
        self.accumulate(*_feature_frequency_update(f))


class FeatureFrequency(_FiringCounts):
    r"""Share of tokens on which each latent fires.

    .. math:: p_j = \frac{1}{T} \sum_t [f_{tj} \neq 0]

    :math:`f_{tj}` is latent :math:`j` at token :math:`t` of :math:`T`. `compute` returns
    shape `[d_sae]`.

    Args:
        d_sae: Number of latents.
        kwargs: As for every `torchmetrics.Metric`.

    Raises:
        ValueError: If `d_sae` is not positive.

    Example:
        >>> import torch
        >>> metric = FeatureFrequency(d_sae=3)
        >>> metric(torch.tensor([[0.0, 2.0, 0.5], [0.0, 0.0, 1.0]]))
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """

    higher_is_better = None

    def compute(self) -> Float[Tensor, " d_sae"]:
        """Shares of all tokens seen."""
        return _feature_frequency_compute(self.num_firings, self.num_tokens)


class DeadFraction(_FiringCounts):
    r"""Share of latents that fire on none of the tokens seen.

    .. math:: \frac{1}{d_\text{sae}} \sum_j [p_j = 0]

    :math:`p_j` is the :class:`FeatureFrequency`. It falls as the number of tokens grows, so compare
    it only at equal numbers of tokens.

    Args:
        d_sae: Number of latents.
        kwargs: As for every `torchmetrics.Metric`.

    Raises:
        ValueError: If `d_sae` is not positive.

    Example:
        >>> import torch
        >>> metric = DeadFraction(d_sae=4)
        >>> metric(torch.tensor([[0.0, 2.0, 0.5, 3.0], [0.0, 0.0, 1.0, 0.0]]))
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Float[Tensor, ""]:
        """Share of all latents."""
        return _dead_fraction_compute(self.num_firings, self.num_tokens)


class FrequencyBelow(_FiringCounts):
    r"""Share of latents whose firing frequency is strictly below a threshold.

    .. math:: \frac{1}{d_\text{sae}} \sum_j [p_j < \text{threshold}]

    :math:`p_j` is the :class:`FeatureFrequency`. Latents that never fire count.

    Args:
        d_sae: Number of latents.
        threshold: Frequency as a share of tokens, in (0, 1].
        kwargs: As for every `torchmetrics.Metric`.

    Raises:
        ValueError: If `d_sae` is not positive or `threshold` is not in (0, 1].

    Example:
        >>> import torch
        >>> metric = FrequencyBelow(d_sae=4, threshold=0.6)
        >>> metric(torch.tensor([[0.0, 2.0, 0.5, 3.0], [0.0, 0.0, 1.0, 0.0]]))
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, d_sae: int, threshold: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(d_sae, **kwargs)
        _check_threshold(threshold)
        self.threshold = threshold

    def compute(self) -> Float[Tensor, ""]:
        """Share of all latents."""
        return _frequency_below_compute(self.num_firings, self.num_tokens, self.threshold)
