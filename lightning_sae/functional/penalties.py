"""Sparsity penalties: non-negative functions of an activation.

Each is 0 at 0 with a finite slope, so it is enough to evaluate it on the active latents.
`batch_penalty` sums over latents and averages over the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import require_positive
from lightning_sae.functional.sparse.code import Code


class Penalty(ABC):
    """Penalty of a single activation."""

    @abstractmethod
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The non-negative penalty of each activation; 0 for an activation of 0."""


@dataclass(frozen=True)
class L1(Penalty):
    r"""The activation itself, :math:`f`.

    Example:
        >>> L1()(torch.tensor([0.0, 2.0]))
        tensor([0., 2.])
    """

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return f


@dataclass(frozen=True)
class Power(Penalty):
    r""":math:`(f + \epsilon)^p - \epsilon^p`.

    Its slope at 0 is :math:`p\,\epsilon^{p-1}`. Far above epsilon it is :math:`f^p` minus a
    constant.

    Args:
        p: Exponent in (0, 1].
        epsilon: Activation below which the power is nearly linear.
    """

    p: float = 0.5
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.epsilon <= 0:
            raise ValueError(
                "Expected argument `p` to be in (0, 1] and `epsilon` to be positive but got "
                f"p={self.p} and epsilon={self.epsilon}."
            )

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        # This form is accurate near 0, where the two terms of the formula cancel.
        return self.epsilon**self.p * torch.expm1(self.p * torch.log1p(f / self.epsilon))


@dataclass(frozen=True)
class Sqrt(Power):
    r""":math:`\sqrt{f + \epsilon} - \sqrt\epsilon`.

    Its slope at 0 is :math:`1 / (2\sqrt\epsilon)`, 15.8 for the default.

    Source: the square root in place of the L1 penalty. The shift by epsilon is an addition of this
    package, because the slope of a plain root at 0 is infinite.

    Args:
        p: Must be 0.5.
        epsilon: Activation below which the root is nearly linear.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p != 0.5:
            raise ValueError(
                f"Expected argument `p` of `Sqrt` to be 0.5 but got {self.p}: use `Power`."
            )


@dataclass(frozen=True)
class Log(Penalty):
    r""":math:`\log(1 + a f)`.

    Source: Rajamanoharan et al., Improving dictionary learning with gated SAEs (2024), discussion
    of smooth penalties for plain SAEs.

    Args:
        a: Curvature; large activations cost :math:`\log a f`.
    """

    a: float = 1.0

    def __post_init__(self) -> None:
        require_positive(a=self.a)

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.log1p(self.a * f)


@dataclass(frozen=True)
class Tanh(Penalty):
    r""":math:`\tanh(c f)`, approximately the number of latents that fire well above 1/c.

    Source: Conerly et al., Circuits Updates, January 2025.

    Args:
        c: Inverse of the activation at which the penalty saturates.
    """

    c: float = 4.0

    def __post_init__(self) -> None:
        require_positive(c=self.c)

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.tanh(self.c * f)


def batch_penalty(
    penalty: Penalty, f: Code, norms: Float[Tensor, " d_sae"] | None = None
) -> Float[Tensor, ""]:
    r"""Mean over the batch of :math:`\sum_j p(f_j \|W_{dec,j}\|)`; norms are 1 by default.

    With the norms, smaller activations with longer decoder rows do not lower the penalty.

    Example:
        >>> f = Code.of_matrix(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> batch_penalty(L1(), f)
        tensor(3.)
    """
    costs = penalty(f.values if norms is None else f.values * f.at(norms))
    return costs.sum() / f.shape[0]  # silent latents contribute 0


def describe(penalty: Penalty) -> dict[str, Any]:
    """A penalty of this package as plain values, in the format of a configuration file."""
    kind = type(penalty)
    return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": dict(vars(penalty))}


def from_description(description: dict[str, Any]) -> Penalty:
    """The penalty that `describe` described.

    Raises:
        ValueError: If it is not one of this package's penalties; a file must not run other code.
    """
    known = {f"{__name__}.{kind.__name__}": kind for kind in (L1, Power, Sqrt, Log, Tanh)}
    name = description.get("class_path") if isinstance(description, dict) else description
    if name not in known:
        raise ValueError(
            f"Expected a penalty of this package, one of {sorted(known)}, but got {name}: load "
            "the weights into an SAE built in Python with that penalty."
        )
    return known[name](**description.get("init_args", {}))


def plain_arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """An SAE's arguments as plain values, with penalties as `describe` writes them."""
    return {
        name: describe(value) if isinstance(value, Penalty) else value
        for name, value in hparams.items()
    }
