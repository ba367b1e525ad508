"""Relatives of the gated SAE: a ReLU encoder with a scale and shift against shrinkage."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.gated import GatedSAE
from lightning_sae.functional.sparse.code import Code


class RescaleAndShiftSAE(GatedSAE):
    r"""A ReLU encoder whose active latents are rescaled and shifted.

    .. math::
        \pi &= (x - b_{dec}) W_{enc} + b_{enc}, \quad
        f = [\pi > 0]\, (e^{r_{mag}} \pi + b_{mag}) \\
        L &= \|x - \hat x(f)\|^2 + \lambda \sum_j \mathrm{ReLU}(\pi_j)
        + \|x - \hat x_{frozen}(\mathrm{ReLU}(\pi))\|^2 \quad \text{(mean over the batch)}

    The loss is that of `GatedSAE`. Unlike there, the magnitude of a latent depends on `b_enc`,
    which the penalty lowers. Source: Rajamanoharan et al., Improving dictionary learning with gated
    sparse autoencoders (2024), section 5.2, "baseline + rescale & shift"; there the scale and shift
    are trained after all other weights, which are frozen, and here together with them. With
    `use_b_mag=False` it is the paper's variant without a Heaviside step,
    :math:`f = e^{r_{mag}}\,\mathrm{ReLU}(\pi)`.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        l1_coefficient: Weight lambda of the penalty.
        kwargs: Arguments of `GatedSAE` and `SparseAutoencoder`.

    Raises:
        ValueError: If an argument is out of range.
    """

    rows_are_independent = True
    may_be_split = True
    latents_follow_activate = False  # training uses `magnitudes`

    def __init__(
        self, d_in: int, d_sae: int | None = None, l1_coefficient: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(d_in, d_sae, l1_coefficient, **kwargs)
        self.save_hyperparameters()

    @override
    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Positive pre-activations, rescaled and shifted."""
        return (self.r_mag.exp() * pre + self.b_mag) * (pre > 0)

    @override
    def magnitudes(self, gate: Code) -> Code:
        """Latents from the positive pre-activations."""
        return gate.with_values(gate.at(self.r_mag.exp()) * gate.values + gate.at(self.b_mag))

    @override
    def shift_pre_activations(self, state: dict[str, Tensor], by: Float[Tensor, " d_sae"]) -> None:
        """Shift the encoder's bias, from which the magnitudes follow."""
        SparseAutoencoder.shift_pre_activations(self, state, by)
