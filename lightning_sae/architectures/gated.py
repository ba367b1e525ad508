"""Gated SAE: a gate decides which latents are active, and magnitudes how strongly."""

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.objective import Step
from lightning_sae.checks import require_not_negative, require_one_of
from lightning_sae.functional.penalties import L1, Penalty, batch_penalty
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import Above
from lightning_sae.functional.squared_error import squared_errors


class GatedSAE(SparseAutoencoder):
    r"""An SAE with a gate that is penalised by L1, and magnitudes that are not.

    .. math::
        \pi &= (x - b_{dec}) W_{enc} + b_{enc}, \quad
        f = [\pi > 0]\, \mathrm{ReLU}(e^{r_{mag}} (\pi - b_{enc}) + b_{mag}) \\
        L &= \|x - \hat x(f)\|^2 + \lambda \sum_j \mathrm{ReLU}(\pi_j)
        + \|x - \hat x_{frozen}(\mathrm{ReLU}(\pi))\|^2 \quad \text{(mean over the batch)}

    Magnitudes and gate have the same weights up to a scale, so the encoder needs one product for
    both; `b_enc` is the gate's bias. The last term, the auxiliary loss, is what trains the gate to
    reconstruct; without it the penalty closes all gates. Its decoder gets no gradient. Source:
    Rajamanoharan et al., Improving dictionary learning with gated sparse autoencoders (2024).

    With `decoder_norm="free"` the penalty is :math:`\lambda \sum_j \mathrm{ReLU}(\pi_j)
    \|W_{dec,j}\|`. Then the decoder in the auxiliary loss and the norms in the penalty should
    either both get gradients or both not: otherwise one loss can be lowered by decoder norms
    without the other counting their cost.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        l1_coefficient: Weight lambda of the penalty.
        penalty: Another function of ReLU(pi), one of `lightning_sae.functional.penalties`; `L1` by
            default.
        auxiliary_decoder: Whether the decoder of the auxiliary loss gets gradients (`live`) or
            not, as in the paper (`frozen`).
        norms_in_penalty: The same of the norms in the penalty, with `decoder_norm="free"`; as
            `auxiliary_decoder` by default.
        use_b_mag: Whether the bias of the magnitudes, `b_mag`, is trained; otherwise it is 0.
        auxiliary_coefficient: Weight of the auxiliary loss, 1 in the paper.
        target_l0: L0 to which `TargetL0` steers the penalty, from `l1_coefficient` on; null for a
            fixed coefficient.
        kwargs: Arguments of `SparseAutoencoder`.

    Raises:
        ValueError: If an argument is out of range.
    """

    r_mag: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]
    coefficient_name = "l1_coefficient"
    latent_units = ("b_enc", "b_mag")
    rows_are_independent = True
    may_be_split = True
    latents_follow_activate = False

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        l1_coefficient: float = 1.0,
        penalty: Penalty | None = None,
        auxiliary_decoder: Literal["frozen", "live"] = "frozen",
        norms_in_penalty: Literal["frozen", "live"] | None = None,
        use_b_mag: bool = True,
        auxiliary_coefficient: float = 1.0,
        target_l0: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.save_hyperparameters()
        require_not_negative(
            l1_coefficient=l1_coefficient, auxiliary_coefficient=auxiliary_coefficient
        )
        norms_in_penalty = norms_in_penalty or auxiliary_decoder
        require_one_of(("frozen", "live"), auxiliary_decoder=auxiliary_decoder)
        require_one_of(("frozen", "live"), norms_in_penalty=norms_in_penalty)
        if self.decoder_norm == "free" and norms_in_penalty != auxiliary_decoder:
            warnings.warn(
                f"`auxiliary_decoder` is {auxiliary_decoder} but `norms_in_penalty` is "
                f"{norms_in_penalty}: with free decoder norms, one loss can then be lowered at no "
                "cost in the other. Set both to `live` or both to `frozen`.",
                stacklevel=2,
            )
        self.l1_coefficient, self.penalty = l1_coefficient, penalty or L1()
        self.steered_l0 = target_l0
        self.auxiliary_decoder, self.norms_in_penalty = auxiliary_decoder, norms_in_penalty
        self.auxiliary_coefficient = auxiliary_coefficient
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae), requires_grad=use_b_mag)

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Magnitudes where the gate is open."""
        magnitudes = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
        return magnitudes.relu() * (pre > 0)

    def magnitudes(self, gate: Code) -> Code:
        """Latents from the positive gate pre-activations."""
        ungated = gate.values - gate.at(self.b_enc)
        return gate.with_values((gate.at(self.r_mag.exp()) * ungated + gate.at(self.b_mag)).relu())

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """The three terms on centred and scaled activations."""
        gate = self.code(x, Above(0.0))
        f = self.magnitudes(gate)
        x_hat = self.reconstruct(f)
        errors = squared_errors(x, x_hat)
        cost = self.parts.sum(batch_penalty(self.penalty, gate, self._norms()))
        losses = {
            "squared_error": errors.mean(),
            "l1": self.weight_of_penalty() * cost,
            "auxiliary": self.auxiliary_coefficient * self._auxiliary(x, gate),
            **self.revival(x, x_hat),
        }
        return Step(losses, f, x_hat, errors)

    def _norms(self) -> Float[Tensor, " d_sae"] | None:
        norms = self.penalty_norms()
        return norms.detach() if norms is not None and self.norms_in_penalty == "frozen" else norms

    def _auxiliary(self, x: Float[Tensor, "batch d_in"], gate: Code) -> Float[Tensor, ""]:
        W_dec, b_dec = self.W_dec, self.b_dec
        if self.auxiliary_decoder == "frozen":
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        return squared_errors(x, self.decoded(gate, W_dec) + b_dec).mean()

    @override
    def fresh_latent(self) -> dict[str, float]:
        """As in the base class, with magnitudes equal to the gate's pre-activations."""
        return {**super().fresh_latent(), "r_mag": 0.0, "b_mag": 0.0}

    @override
    def shift_pre_activations(self, state: dict[str, Tensor], by: Float[Tensor, " d_sae"]) -> None:
        """Shift the biases of the gate and of the magnitudes."""
        super().shift_pre_activations(state, by)
        state["b_mag"] = state["b_mag"] + self.r_mag.exp() * by
