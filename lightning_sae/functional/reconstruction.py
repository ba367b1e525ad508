r"""How well a reconstruction `x_hat` matches the activations `x`.

Results refer to the space of the given tensors: raw activations if raw ones are given, scaled ones
if scaled ones are given. Here :math:`x_t` and :math:`\hat x_t` are the activation and its
reconstruction at token :math:`t` of :math:`T`, vectors of `d_in` entries. All leading axes are
token axes. Sums are computed in float64 for inputs of any dtype.

Each metric has three functions: `_x_update` computes sums and counts from tensors, `_x_compute`
computes the result from those, and the public function calls both.
"""

from jaxtyping import Float, Int
from torch import Tensor

Count = int | Int[Tensor, ""]


def _float64_tokens(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_in"]]:
    """Check the shapes, flatten the token axes and convert to float64."""
    if x.ndim == 0 or x.shape != x_hat.shape:
        raise ValueError(
            "Expected arguments `x` and `x_hat` to have the same shape [..., d_in] but got "
            f"{tuple(x.shape)} and {tuple(x_hat.shape)}: pass the reconstruction of `x`."
        )
    d_in = x.shape[-1]
    return x.reshape(-1, d_in).double(), x_hat.reshape(-1, d_in).double()


def _mse_update(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> tuple[Float[Tensor, ""], int]:
    x, x_hat = _float64_tokens(x, x_hat)
    return (x - x_hat).square().sum(), len(x)


def _mse_compute(squared_error: Float[Tensor, ""], num_tokens: Count) -> Float[Tensor, ""]:
    return squared_error / num_tokens


def mse(x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> Float[Tensor, ""]:
    r"""Squared error, summed over `d_in` and averaged over tokens.

    .. math:: \frac{1}{T} \sum_t \|x_t - \hat x_t\|^2

    In squared units of the activations. It is `d_in` times the "mean squared error" of libraries
    that also average over `d_in`.

    Args:
        x: Activations, shape `[..., d_in]`.
        x_hat: Their reconstruction, same shape.

    Returns:
        A float64 scalar; NaN for no tokens.

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> mse(x, torch.tensor([[3.0, 2.0], [1.0, 2.0]]))
        tensor(2.5000, dtype=torch.float64)
    """
    return _mse_compute(*_mse_update(x, x_hat))


def _fvu_update(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, " d_in"], int]:
    x, x_hat = _float64_tokens(x, x_hat)
    return (x - x_hat).square().sum(), x.square().sum(), x.sum(0), len(x)


def _fvu_compute(
    squared_error: Float[Tensor, ""],
    sum_x_squared: Float[Tensor, ""],
    sum_x: Float[Tensor, " d_in"],
    num_tokens: Count,
) -> Float[Tensor, ""]:
    return squared_error / (sum_x_squared - sum_x.square().sum() / num_tokens)


def fvu(x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> Float[Tensor, ""]:
    r"""Fraction of variance unexplained.

    .. math:: \frac{\sum_t \|x_t - \hat x_t\|^2}{\sum_t \|x_t - \bar x\|^2},
        \qquad \bar x = \frac{1}{T} \sum_t x_t

    Dimensionless: 0 is perfect, 1 is the value for the constant :math:`\bar x`. Numerator and
    denominator are each summed over all tokens and over `d_in`; it is not a mean of ratios over
    tokens or dimensions.

    Args:
        x: Activations, shape `[..., d_in]`.
        x_hat: Their reconstruction, same shape.

    Returns:
        A float64 scalar; meaningless if `x` does not vary (one token, constant `x`).

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> fvu(x, torch.tensor([[3.0, 2.0], [1.0, 2.0]]))
        tensor(0.7692, dtype=torch.float64)
    """
    return _fvu_compute(*_fvu_update(x, x_hat))


def explained_variance(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> Float[Tensor, ""]:
    r"""Fraction of variance explained, one minus :func:`fvu`.

    .. math:: 1 - \frac{\sum_t \|x_t - \hat x_t\|^2}{\sum_t \|x_t - \bar x\|^2}

    Dimensionless: 1 is perfect, 0 is the value for the constant mean. A constant offset of
    `x_hat` counts as error.

    Args:
        x: Activations, shape `[..., d_in]`.
        x_hat: Their reconstruction, same shape.

    Returns:
        A float64 scalar; meaningless if `x` does not vary.

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> explained_variance(x, torch.tensor([[3.0, 2.0], [1.0, 2.0]]))
        tensor(0.2308, dtype=torch.float64)
    """
    return 1 - fvu(x, x_hat)


def _l2_ratio_update(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    x, x_hat = _float64_tokens(x, x_hat)
    norm = x.norm(dim=-1)
    kept = norm > 0
    return (x_hat.norm(dim=-1)[kept] / norm[kept]).sum(), kept.sum()


def _l2_ratio_compute(sum_norm_ratio: Float[Tensor, ""], num_nonzero: Count) -> Float[Tensor, ""]:
    return sum_norm_ratio / num_nonzero


def l2_ratio(x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]) -> Float[Tensor, ""]:
    r"""Norm of the reconstruction relative to that of the activation, averaged over tokens.

    .. math:: \frac{1}{T} \sum_t \frac{\|\hat x_t\|}{\|x_t\|}

    Dimensionless. It falls below 1 both when activations are shrunk and when directions are
    wrong; :func:`relative_reconstruction_bias` separates the two. Tokens with
    :math:`\|x_t\| = 0` are ignored. Source: Wright and Sharkey, "Addressing
    Feature Suppression in SAEs" (2024).

    Args:
        x: Activations, shape `[..., d_in]`.
        x_hat: Their reconstruction, same shape.

    Returns:
        A float64 scalar; NaN if all activations are zero.

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> l2_ratio(x, torch.tensor([[0.0, 4.0], [0.0, 1.0]]))
        tensor(0.6500, dtype=torch.float64)
    """
    return _l2_ratio_compute(*_l2_ratio_update(x, x_hat))


def _relative_reconstruction_bias_update(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    x, x_hat = _float64_tokens(x, x_hat)
    return x_hat.square().sum(), (x * x_hat).sum()


def _relative_reconstruction_bias_compute(
    sum_x_hat_squared: Float[Tensor, ""], sum_inner_product: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    return sum_x_hat_squared / sum_inner_product


def relative_reconstruction_bias(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> Float[Tensor, ""]:
    r"""Factor by which reconstructions are too long: dividing by it minimizes the error.

    .. math:: \gamma = \arg\min_{\gamma'} \sum_t \|\hat x_t / \gamma' - x_t\|^2
        = \frac{\sum_t \|\hat x_t\|^2}{\sum_t x_t \cdot \hat x_t}

    Dimensionless: 1 means no shrinkage, less than 1 shrinkage; :math:`\hat x = \alpha x` gives
    :math:`\alpha`. Unlike :func:`l2_ratio` it is 1 for an orthogonal projection of `x`, which is
    shorter than `x` although rescaling would not improve it. Source: Rajamanoharan et al.,
    "Improving Dictionary Learning with Gated Sparse Autoencoders" (2024), in the corrected form.

    Args:
        x: Activations, shape `[..., d_in]`.
        x_hat: Their reconstruction, same shape.

    Returns:
        A float64 scalar; NaN if every reconstruction is zero.

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> relative_reconstruction_bias(x, 0.5 * x)
        tensor(0.5000, dtype=torch.float64)
        >>> relative_reconstruction_bias(x, torch.tensor([[0.0, 4.0], [0.0, 2.0]]))
        tensor(1., dtype=torch.float64)
    """
    return _relative_reconstruction_bias_compute(*_relative_reconstruction_bias_update(x, x_hat))


def _cosine_similarity_update(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    x, x_hat = _float64_tokens(x, x_hat)
    kept = x.norm(dim=-1) > 0
    x, x_hat = x[kept], x_hat[kept]
    norm, norm_hat = x.norm(dim=-1), x_hat.norm(dim=-1)
    # A zero reconstruction has inner product 0: dividing by 1 there makes its cosine 0, not NaN.
    cosine = (x * x_hat).sum(-1) / (norm * norm_hat.masked_fill(norm_hat == 0, 1))
    return cosine.sum(), kept.sum()


def _cosine_similarity_compute(
    sum_cosine: Float[Tensor, ""], num_nonzero: Count
) -> Float[Tensor, ""]:
    return sum_cosine / num_nonzero


def cosine_similarity(
    x: Float[Tensor, "... d_in"], x_hat: Float[Tensor, "... d_in"]
) -> Float[Tensor, ""]:
    r"""Cosine of the angle between activation and reconstruction, averaged over tokens.

    .. math:: \frac{1}{T} \sum_t \frac{x_t \cdot \hat x_t}{\|x_t\| \, \|\hat x_t\|}

    From -1 to 1. Tokens with :math:`\|x_t\| = 0` are ignored; a zero reconstruction of a nonzero
    activation counts as cosine 0.

    Args:
        x: Activations, shape `[..., d_in]`.
        x_hat: Their reconstruction, same shape.

    Returns:
        A float64 scalar; NaN if all activations are zero.

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> cosine_similarity(x, torch.tensor([[0.0, 4.0], [0.0, 1.0]]))
        tensor(0.9000, dtype=torch.float64)
    """
    return _cosine_similarity_compute(*_cosine_similarity_update(x, x_hat))
