"""The plain sparse autoencoder: a ReLU and an L1 penalty."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.architectures.base import SparseAutoencoder, Step
from lightning_sae.functional.penalties import l1


class ReLUSAE(SparseAutoencoder):
    r"""Untied autoencoder with ReLU latents and an L1 penalty.

    .. math::
        f &= \mathrm{ReLU}((x - b_{dec}) W_{enc} + b_{enc}), \quad \hat x = f W_{dec} + b_{dec} \\
        L &= \|x - \hat x\|^2 + \lambda \sum_j f_j \quad \text{(mean over the batch)}

    With `apply_b_dec_to_input=False` the encoder sees x itself; with `decoder_norm="free"` the
    penalty is :math:`\lambda \sum_j f_j \|W_{dec,j}\|`. Source: Bricken et al., Towards
    Monosemanticity (2023); the squared error is summed over d_in. One binary feature of strength
    g is learnt as g - lambda/2.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        l1_coefficient: Weight lambda of the penalty, against a squared error summed over d_in.
        kwargs: Arguments of `SparseAutoencoder`.

    Raises:
        ValueError: If a size, a rate or the coefficient is out of range.
    """

    def __init__(self, d_in: int, d_sae: int, l1_coefficient: float = 1.0, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.save_hyperparameters()
        if l1_coefficient < 0:
            raise ValueError(
                f"Expected argument `l1_coefficient` to be at least 0 but got {l1_coefficient}."
            )
        self.l1_coefficient = l1_coefficient

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The positive part."""
        return torch.relu(pre)

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared error and penalty on centred and scaled activations."""
        f = self.activate(self.pre_activations(x))
        x_hat = self.reconstruct(f)
        norms = None if self.decoder_norm == "unit" else self.W_dec.norm(dim=-1)
        losses = {
            "squared_error": (x_hat - x).pow(2).sum(-1).mean(),
            "l1": self.penalty_scale * self.l1_coefficient * l1(f, norms),
        }
        return Step(losses, f, x_hat)
