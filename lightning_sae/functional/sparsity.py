r"""How many latents fire, and how often.

Here :math:`f_{tj}` is latent :math:`j` of `d_sae` at token :math:`t` of :math:`T`. A latent fires
on a token if its value is nonzero. All leading axes are token axes. Results do not change if
latents are scaled by a positive number, so raw and scaled spaces agree.

Each metric has three functions: `_x_update` computes counts from tensors, `_x_compute` computes the
result from those, and the public function calls both.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Count = int | Int[Tensor, ""]


def _tokens(f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "tokens d_sae"]:
    """Flatten the token axes."""
    if f.ndim == 0:
        raise ValueError(
            "Expected argument `f` to have shape [..., d_sae] but got a scalar: pass the latents "
            "of at least one token."
        )
    return f.reshape(-1, f.shape[-1])


def _l0_update(f: Float[Tensor, "... d_sae"]) -> tuple[Int[Tensor, ""], int]:
    f = _tokens(f)
    return torch.count_nonzero(f), len(f)


def _l0_compute(num_active: Int[Tensor, ""], num_tokens: Count) -> Float[Tensor, ""]:
    return num_active.double() / num_tokens


def l0(f: Float[Tensor, "... d_sae"]) -> Float[Tensor, ""]:
    r"""Mean number of latents that fire on a token.

    .. math:: \frac{1}{T} \sum_t \sum_j [f_{tj} \neq 0]

    Args:
        f: Latent activations, shape `[..., d_sae]`.

    Returns:
        A float64 scalar; NaN for no tokens.

    Raises:
        ValueError: If `f` is a scalar.

    Example:
        >>> import torch
        >>> l0(torch.tensor([[0.0, 2.0, 0.5], [0.0, 0.0, 1.0]]))
        tensor(1.5000, dtype=torch.float64)
    """
    return _l0_compute(*_l0_update(f))


def _feature_frequency_update(f: Float[Tensor, "... d_sae"]) -> tuple[Int[Tensor, " d_sae"], int]:
    f = _tokens(f)
    return torch.count_nonzero(f, dim=0), len(f)


def _feature_frequency_compute(
    num_firings: Int[Tensor, " d_sae"], num_tokens: Count
) -> Float[Tensor, " d_sae"]:
    return num_firings.double() / num_tokens


def feature_frequency(f: Float[Tensor, "... d_sae"]) -> Float[Tensor, " d_sae"]:
    r"""Share of tokens on which each latent fires.

    .. math:: p_j = \frac{1}{T} \sum_t [f_{tj} \neq 0]

    Args:
        f: Latent activations, shape `[..., d_sae]`.

    Returns:
        Frequencies in float64, shape `[d_sae]`; NaN for no tokens.

    Raises:
        ValueError: If `f` is a scalar.

    Example:
        >>> import torch
        >>> feature_frequency(torch.tensor([[0.0, 2.0, 0.5], [0.0, 0.0, 1.0]]))
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    return _feature_frequency_compute(*_feature_frequency_update(f))


def _dead_fraction_compute(
    num_firings: Int[Tensor, " d_sae"], num_tokens: Count
) -> Float[Tensor, ""]:
    frequency = _feature_frequency_compute(num_firings, num_tokens)
    # Without tokens nothing is known: NaN, not 1.
    return (frequency == 0).double().masked_fill(frequency.isnan(), torch.nan).mean()


def dead_fraction(f: Float[Tensor, "... d_sae"]) -> Float[Tensor, ""]:
    r"""Share of latents that fire on none of the tokens.

    .. math:: \frac{1}{d_\text{sae}} \sum_j [p_j = 0]

    With :math:`p_j` as in :func:`feature_frequency`. It falls as the number of tokens grows, so
    compare it only at equal numbers of tokens.

    Args:
        f: Latent activations, shape `[..., d_sae]`.

    Returns:
        A float64 scalar; NaN for no tokens.

    Raises:
        ValueError: If `f` is a scalar.

    Example:
        >>> import torch
        >>> dead_fraction(torch.tensor([[0.0, 2.0, 0.5, 3.0], [0.0, 0.0, 1.0, 0.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    return _dead_fraction_compute(*_feature_frequency_update(f))


def _frequency_below_compute(
    num_firings: Int[Tensor, " d_sae"], num_tokens: Count, threshold: float
) -> Float[Tensor, ""]:
    frequency = _feature_frequency_compute(num_firings, num_tokens)
    return (frequency < threshold).double().masked_fill(frequency.isnan(), torch.nan).mean()


def frequency_below(f: Float[Tensor, "... d_sae"], threshold: float = 1e-5) -> Float[Tensor, ""]:
    r"""Share of latents whose firing frequency is strictly below a threshold.

    .. math:: \frac{1}{d_\text{sae}} \sum_j [p_j < \text{threshold}]

    With :math:`p_j` as in :func:`feature_frequency`. Latents that never fire count; with fewer
    than `1 / threshold` tokens only those do.

    Args:
        f: Latent activations, shape `[..., d_sae]`.
        threshold: Frequency as a share of tokens, in (0, 1].

    Returns:
        A float64 scalar; NaN for no tokens.

    Raises:
        ValueError: If `f` is a scalar or `threshold` is not in (0, 1].

    Example:
        >>> import torch
        >>> f = torch.tensor([[0.0, 2.0, 0.5, 3.0], [0.0, 0.0, 1.0, 0.0]])
        >>> frequency_below(f, threshold=0.5)
        tensor(0.2500, dtype=torch.float64)
        >>> frequency_below(f, threshold=0.6)
        tensor(0.7500, dtype=torch.float64)
    """
    _check_threshold(threshold)
    return _frequency_below_compute(*_feature_frequency_update(f), threshold)


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(
            f"Expected argument `threshold` to be in (0, 1] but got {threshold}: it is a share of "
            "tokens, for example 1e-5."
        )
