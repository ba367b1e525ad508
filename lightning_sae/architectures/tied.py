"""Tied SAE: the encoder is the transpose of the decoder and has no bias."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.architectures.initial import create_directions
from lightning_sae.architectures.objective import Step
from lightning_sae.architectures.relu import ReLUSAE
from lightning_sae.checks import require_not_negative, require_positive
from lightning_sae.functional.jumprelu import jumprelu
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import Above


class TiedSAE(ReLUSAE):
    r"""A ReLU SAE whose latents have one direction for encoder and decoder.

    .. math::
        f = \mathrm{ReLU}((x - b_{dec}) W_{dec}^T), \quad \hat x = f W_{dec} + b_{dec}, \quad
        L = \|x - \hat x\|^2 + \lambda \sum_j p(f_j) \quad \text{(mean over the batch)}

    `W_enc` is a view of `W_dec`, and `b_enc` is always 0. Latents whose directions are not
    orthogonal interfere with each other. Source: Chanin et al., Broken latents: studying SAEs and
    feature co-occurrence in toy models (2024).

    With `threshold_init`, a latent is active above its own trained threshold instead of above 0;
    see `lightning_sae.functional.jumprelu`.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        l1_coefficient: Weight lambda of the penalty.
        threshold_init: Initial value of the thresholds; null for a ReLU.
        bandwidth: Width of the window around a threshold in which it gets a gradient.
        kwargs: Arguments of `ReLUSAE`.

    Raises:
        ValueError: If an argument is out of range.
    """

    tied = True
    share_of_peak_rate = 0.5  # more latents die at a higher rate, and
    default_decay = 0  # at this one FVU is 3 to 7 % higher with a decay
    latents_follow_activate = True
    rows_are_independent = True
    may_be_split = True

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        l1_coefficient: float = 1.0,
        threshold_init: float | None = None,
        bandwidth: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, l1_coefficient, **kwargs)
        self.save_hyperparameters()
        require_not_negative(threshold_init=threshold_init or 0.0)
        require_positive(bandwidth=bandwidth)
        self.threshold_init, self.bandwidth = threshold_init, bandwidth
        self.threshold: nn.Parameter | None = None
        if threshold_init is not None:
            self.threshold = nn.Parameter(torch.full((self.d_sae,), float(threshold_init)))
            self.latent_units = ("b_enc", "threshold")
            self.kept_in_float32 = ("threshold",)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # type: ignore[override]
        """The decoder's transpose."""
        return self.W_dec.T

    def _create_dictionary(self) -> None:
        create_directions(self, self.d_sae, self.d_in, {"W_dec": 0}, self.decoder_init_norm)
        self.register_buffer("b_enc", torch.zeros(self.d_sae))

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The positive part, or pre-activations above their threshold."""
        return pre.relu() if self.threshold is None else pre * (pre > self.threshold.relu())

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """The active pre-activations; the latents of `activate` where a subclass overrides it."""
        if type(self).activate is not TiedSAE.activate:
            return super().latents(x)
        return self._jumped(self._candidates(x))

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared error and penalty, on centred and scaled activations."""
        if self.threshold is None or type(self).activate is not TiedSAE.activate:
            return super().objective(x)
        v = self._candidates(x)
        return self.step(x, self._jumped(v), v)

    @override
    def fresh_latent(self) -> dict[str, float]:
        """As in `ReLUSAE`, and the initial threshold if there are thresholds."""
        start = {} if self.threshold_init is None else {"threshold": self.threshold_init}
        return {**super().fresh_latent(), **start}

    def _candidates(self, x: Tensor) -> Code:
        """Pre-activations above 0, or above the lower end of their threshold's window."""
        if self.threshold is None:
            return self.code(x, Above(0.0))
        return self.code(x, Above(self.threshold.detach().relu() - self.bandwidth / 2))

    def _jumped(self, v: Code) -> Code:
        if self.threshold is None:
            return v
        # A threshold below 0 acts as 0 and gets the gradient at 0, as in `JumpReLUSAE`.
        theta = self.threshold + (self.threshold.relu() - self.threshold).detach()
        return v.with_values(jumprelu(v.values, v.at(theta), self.bandwidth))
