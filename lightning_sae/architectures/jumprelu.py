"""JumpReLU SAE: a threshold of its own for each latent, trained by pseudo-derivatives."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.objective import Step
from lightning_sae.checks import require_not_negative, require_positive
from lightning_sae.functional.jumprelu import jumprelu, step
from lightning_sae.functional.penalties import Penalty, batch_penalty
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import Above
from lightning_sae.functional.squared_error import squared_errors


class JumpReLUSAE(SparseAutoencoder):
    r"""Latents that are their pre-activation above a threshold, and 0 below.

    .. math::
        v &= (x - b_{dec}) W_{enc} + b_{enc}, \quad f = v\,[v > \theta], \quad
        \hat x = f W_{dec} + b_{dec} \\
        L &= \|x - \hat x\|^2 + \lambda \sum_j [v_j > \theta_j] \quad \text{(mean over the batch)}

    The threshold gets pseudo-derivatives in a window, see `lightning_sae.functional.jumprelu`. With
    `target_l0` the penalty is :math:`\lambda (L_0 / L_0^{target} - 1)^2`. Thresholds are kept as
    they are, not as logarithms, and act as 0 where they are negative.

    A count does not see the norms of decoder rows, so nothing has to keep them:
    `decoder_norm="free"`, without `DecoderNormProjection`, leaves fewer latents dead on known
    features, see `lightning_sae.studies.ground_truth.settings`.

    Source: Rajamanoharan et al., Jumping ahead (2024); the loss of dead latents: Conerly et al.,
    Circuits Updates, January 2025.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        l0_coefficient: Weight lambda of the penalty.
        target_l0: Active latents per activation that the penalty aims at; null counts them all.
        penalty: In place of the count, a function of the activation; not with `target_l0`.
        threshold_init: Thresholds at the start.
        bandwidth: Width of the window of the pseudo-derivatives.
        threshold_lr: Learning rate of the thresholds; `lr` by default.
        dead_coefficient: Weight of :math:`\sum_{dead} \mathrm{ReLU}(\theta_j - v_j)
            \|W_{dec,j}\|`, which pulls dead latents back to their threshold.
        kwargs: Arguments of `SparseAutoencoder`.

    Raises:
        ValueError: If an argument is out of range.
    """

    threshold: Float[Tensor, " d_sae"]
    coefficient_name = "l0_coefficient"
    latents_follow_activate = False
    latent_units = ("b_enc", "threshold")
    kept_in_float32 = ("threshold",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l0_coefficient: float = 1.0,
        target_l0: float | None = None,
        penalty: Penalty | None = None,
        threshold_init: float = 0.01,
        bandwidth: float = 0.05,
        threshold_lr: float | None = None,
        dead_coefficient: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.save_hyperparameters()
        require_not_negative(l0_coefficient=l0_coefficient, threshold_init=threshold_init)
        require_not_negative(dead_coefficient=dead_coefficient)
        require_positive(bandwidth=bandwidth, target_l0=1.0 if target_l0 is None else target_l0)
        if threshold_lr is not None:
            require_positive(threshold_lr=threshold_lr)
        if target_l0 is not None and penalty is not None:
            raise ValueError("Expected one of `target_l0` and `penalty` but got both: drop one.")
        self.l0_coefficient, self.target_l0, self.penalty = l0_coefficient, target_l0, penalty
        self.bandwidth = bandwidth
        self.threshold_init, self.threshold_lr = threshold_init, threshold_lr
        self.dead_coefficient = dead_coefficient
        self.threshold = nn.Parameter(torch.full((d_sae,), float(threshold_init)))
        # With a target a mean over the batch is squared; another objective is not known.
        is_own = type(self).objective is JumpReLUSAE.objective
        self.rows_are_independent = is_own and target_l0 is None

    def theta(self) -> Float[Tensor, " d_sae"]:
        """Thresholds in force: those below 0 act as 0, and get the gradient of 0."""
        return self.threshold + (self.threshold.relu() - self.threshold).detach()

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Pre-activations above their threshold."""
        return pre * (pre > self.threshold.relu())

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared error and penalty on centred and scaled activations."""
        theta = self.theta()
        v = self.code(x, Above(theta.detach() - self.bandwidth / 2))
        f = v.with_values(jumprelu(v.values, v.at(theta), self.bandwidth))
        x_hat = self.reconstruct(f)
        errors = squared_errors(x, x_hat)
        losses = {
            "squared_error": errors.mean(),
            "sparsity": self.weight_of_penalty() * self._cost(v, f, theta),
            **self._pull_of_dead(x),
            **self.revival(x, x_hat),
        }
        return Step(losses, f, x_hat, errors)

    def _cost(self, v: Code, f: Code, theta: Float[Tensor, " d_sae"]) -> Float[Tensor, ""]:
        if self.penalty is not None:
            return batch_penalty(self.penalty, f, self.penalty_norms())
        l0 = v.mean_sum(step(v.values, v.at(theta), self.bandwidth))
        if self.target_l0 is None:
            return l0
        return (self.ranks.mean_with_gradient(l0) / self.target_l0 - 1).square()

    def _pull_of_dead(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Float[Tensor, ""]]:
        if self.dead_coefficient == 0:
            return {}
        dead = self.dead.nonzero().squeeze(-1)
        if len(dead) == 0:
            return {"dead": x.new_zeros(())}
        pre = self.encoder_input(x) @ self.W_enc.T[dead].T + self.b_enc[dead]
        missing = (self.theta()[dead] - pre).relu() * self.W_dec[dead].norm(dim=-1)
        return {"dead": self.dead_coefficient * missing.sum(-1).mean()}

    @override
    def fresh_latent(self) -> dict[str, float]:
        """A threshold as at the start."""
        return {**super().fresh_latent(), "threshold": self.threshold_init}

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """All but the thresholds, and the thresholds."""
        group = {"params": [self.threshold]}
        if self.threshold_lr is not None:
            group["lr"] = self.threshold_lr  # type: ignore[assignment]
        trained = [p for p in self.parameters() if p.requires_grad and p is not self.threshold]
        return [{"params": trained}, group]
