"""Sparsity penalties: functions of an activation, never negative, to be summed and averaged.

Each is 0 for a latent that does not fire and has a finite slope there, so that what it says about
active latents is all there is to say. `batch_penalty` sums over latents and averages over the
batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.functional.sparse.code import Code


class Penalty(ABC):
    """What one activation costs."""

    @abstractmethod
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The cost of each activation, which is not negative; 0 for 0."""


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
    r""":math:`(f + \epsilon)^p - \epsilon^p`: the p-th power, without the root.

    Its slope at 0 is :math:`p\,\epsilon^{p-1}`, finite; for activations far above epsilon it is
    :math:`f^p` less a constant.

    Args:
        p: Exponent, above 0 and at most 1.
        epsilon: Activation below which the power is nearly linear.
    """

    p: float = 0.5
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.epsilon <= 0:
            raise ValueError(
                f"Expected `p` above 0 and at most 1, and `epsilon` above 0, but got p={self.p} "
                f"and epsilon={self.epsilon}."
            )

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        # So written it is exact near 0, where the two terms cancel.
        return self.epsilon**self.p * torch.expm1(self.p * torch.log1p(f / self.epsilon))


@dataclass(frozen=True)
class Sqrt(Power):
    r""":math:`\sqrt{f + \epsilon} - \sqrt\epsilon`.

    Its slope at 0 is :math:`1 / (2\sqrt\epsilon)`, 15.8 for the default.

    Source: the square root in place of the L1 penalty; the shift by epsilon is this package's, for
    a root alone has an infinite slope at 0.

    Args:
        p: One half.
        epsilon: Activation below which the root is nearly linear.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p != 0.5:
            raise ValueError(f"Expected `p` of `Sqrt` to be 0.5 but got {self.p}: use `Power`.")


@dataclass(frozen=True)
class Log(Penalty):
    r""":math:`\log(1 + a f)`.

    Source: Rajamanoharan et al., Improving dictionary learning with gated SAEs (2024), the
    discussion of smooth penalties for plain SAEs.

    Args:
        a: How sharply it bends; large activations cost :math:`\log a f`.
    """

    a: float = 1.0

    def __post_init__(self) -> None:
        if self.a <= 0:
            raise ValueError(f"Expected argument `a` to be positive but got {self.a}.")

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.log1p(self.a * f)


@dataclass(frozen=True)
class Tanh(Penalty):
    r""":math:`\tanh(c f)`: nearly a count of latents that fire well above 1/c.

    Source: Conerly et al., Circuits Updates, January 2025.

    Args:
        c: Inverse of the activation at which it saturates.
    """

    c: float = 4.0

    def __post_init__(self) -> None:
        if self.c <= 0:
            raise ValueError(f"Expected argument `c` to be positive but got {self.c}.")

    @override
    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.tanh(self.c * f)


def batch_penalty(
    penalty: Penalty, f: Code, norms: Float[Tensor, " d_sae"] | None = None
) -> Float[Tensor, ""]:
    r"""Mean over the batch of :math:`\sum_j p(f_j \|W_{dec,j}\|)`, norms 1 unless given.

    Weighted so, no penalty is escaped by smaller activations and longer decoder rows.

    Example:
        >>> f = Code.of_matrix(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> batch_penalty(L1(), f)
        tensor(3.)
    """
    costs = penalty(f.values if norms is None else f.values * f.at(norms))
    return costs.sum() / f.shape[0]  # those of latents that do not fire are zero


def describe(penalty: Penalty) -> dict[str, Any]:
    """A penalty of this package as plain values, in the words of a configuration file."""
    kind = type(penalty)
    return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": dict(vars(penalty))}


def from_description(description: dict[str, Any]) -> Penalty:
    """What `describe` described.

    Raises:
        ValueError: If it is none of this package's: no other code is run for what a file says.
    """
    known = {f"{__name__}.{kind.__name__}": kind for kind in (L1, Power, Sqrt, Log, Tanh)}
    name = description["class_path"]
    if name not in known:
        raise ValueError(
            f"Expected a penalty of this package, one of {sorted(known)}, but got {name}: load "
            "the weights into an SAE built in Python with that penalty."
        )
    return known[name](**description.get("init_args", {}))


def plain_arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """An SAE's arguments as plain values: penalties as in a configuration file."""
    return {
        name: describe(value) if isinstance(value, Penalty) else value
        for name, value in hparams.items()
    }
