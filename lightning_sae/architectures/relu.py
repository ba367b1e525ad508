"""The plain sparse autoencoder: a ReLU and a sparsity penalty."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.architectures.objective import Step
from lightning_sae.architectures.orthogonality import WithOrthogonality
from lightning_sae.checks import require_not_negative
from lightning_sae.functional.penalties import L1, Penalty, batch_penalty
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import Above
from lightning_sae.functional.squared_error import squared_errors


class ReLUSAE(WithOrthogonality):
    r"""Autoencoder with ReLU latents and an L1 penalty, or another sparsity penalty.

    .. math::
        f &= \mathrm{ReLU}((x - b_{dec}) W_{enc} + b_{enc}), \quad \hat x = f W_{dec} + b_{dec} \\
        L &= \|x - \hat x\|^2 + \lambda \sum_j p(f_j) \quad \text{(mean over the batch)}

    The squared error is summed over d_in. With `apply_b_dec_to_input=False` the encoder's input is
    x itself; with `decoder_norm="free"` the penalty is of :math:`f_j \|W_{dec,j}\|`, and FVU at the
    same L0 is about 3 % lower after 500 steps (`docs/settings.md`). Source: Bricken et al., Towards
    Monosemanticity (2023), where p(f) = f. This L1 penalty shrinks activations: a single binary
    feature of strength g is learnt as g - lambda/2.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        l1_coefficient: Weight lambda of the penalty.
        penalty: The function p, one of `lightning_sae.functional.penalties`; `L1` by default.
        target_l0: L0 to which `TargetL0` steers the penalty, from `l1_coefficient` on; null for a
            fixed coefficient.
        kwargs: Arguments of `WithOrthogonality` and `SparseAutoencoder`.

    Raises:
        ValueError: If a size, a rate or the coefficient is out of range.
    """

    coefficient_name = "l1_coefficient"
    latents_follow_activate = True
    rows_are_independent = True
    may_be_split = True

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        l1_coefficient: float = 1.0,
        penalty: Penalty | None = None,
        target_l0: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.save_hyperparameters()
        require_not_negative(l1_coefficient=l1_coefficient)
        self.l1_coefficient, self.steered_l0 = l1_coefficient, target_l0
        self.penalty = penalty or L1()

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The positive part."""
        return torch.relu(pre)

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """The positive pre-activations; the latents of `activate` where a subclass overrides it."""
        if type(self).activate is not ReLUSAE.activate:
            return super().latents(x)
        return self.code(x, Above(0.0))

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared error and penalty, on centred and scaled activations."""
        f = self.latents(x)
        return self.step(x, f)

    def step(self, x: Float[Tensor, "batch d_in"], f: Code, v: Code | None = None) -> Step:
        """The loss of latents `f`; `v` are their pre-activations, where these differ from `f`."""
        x_hat = self.reconstruct(f)
        cost = self.parts.sum(batch_penalty(self.penalty, f, self.penalty_norms()))
        errors = squared_errors(x, x_hat)
        losses = {
            "squared_error": errors.mean(),
            "l1": self.weight_of_penalty() * cost,
            **self.orthogonality(x, f, v),
            **self.revival(x, x_hat),
        }
        return Step(losses, f, x_hat, errors)
