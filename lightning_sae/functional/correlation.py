"""Pearson correlation, and partial correlation given a third quantity."""

from jaxtyping import Float
from torch import Tensor


def correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    r"""Pearson's correlation.

    .. math:: r_{xy} = \frac{\sum_i (x_i - \bar x)(y_i - \bar y)}
        {\sqrt{\sum_i (x_i - \bar x)^2 \sum_i (y_i - \bar y)^2}}

    Returns:
        A float64 scalar; NaN if `x` or `y` is constant.

    Raises:
        ValueError: If `x` and `y` differ in length.

    Example:
        >>> import torch
        >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    if x.shape != y.shape:
        raise ValueError(
            f"Expected arguments `x` and `y` to have equal length but got {len(x)} and {len(y)}."
        )
    x, y = x.double(), y.double()
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def partial_correlation(
    x: Float[Tensor, " n"], y: Float[Tensor, " n"], given: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    r"""Correlation of the residuals of `x` and `y` after a linear fit on `given`.

    .. math:: r_{xy \cdot z} =
        \frac{r_{xy} - r_{xz} r_{yz}}{\sqrt{(1 - r_{xz}^2)(1 - r_{yz}^2)}}

    Args:
        x: First quantity.
        y: Second quantity.
        given: Quantity z to control for.

    Returns:
        A float64 scalar; NaN if `x` or `y` is a linear function of `given`.

    Raises:
        ValueError: If the lengths differ.

    Example:
        >>> import torch
        >>> z = torch.tensor([1.0, 1.0, 2.0, 2.0])
        >>> rest = torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> print(f"{partial_correlation(z + rest, z - rest, z):.3f}")
        -1.000
    """
    xy, xz, yz = correlation(x, y), correlation(x, given), correlation(y, given)
    return (xy - xz * yz) / ((1 - xz.square()) * (1 - yz.square())).sqrt()
