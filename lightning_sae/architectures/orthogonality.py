"""An auxiliary loss: encoder directions orthogonal to inputs on which latents fire weakly."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.peaks import MixtureThreshold, PeakThreshold
from lightning_sae.checks import (
    refuse,
    require_not_negative,
    require_one_of,
    require_positive,
)
from lightning_sae.functional.orthogonality import orthogonality
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.patterns import DensePattern


class WithOrthogonality(SparseAutoencoder):
    r"""Base of SAEs that can be trained with the activation orthogonality loss.

    .. math::
        L_{aux} = \tfrac{\lambda_{aux}}{B F} \sum_{i,j} [f_{ij} \le \tau_j]
        \cos(x_i - b_{dec}, W_{enc,j})^2

    The mean is over both the batch and the latents, unlike in a sparsity penalty. Source: Chanin et
    al., Broken latents (2024). It penalises low activations, which are caused by features other
    than the latent's main one. In an SAE with fewer latents than features, the high activations
    are the ones to penalise, because several features add up there: with
    `orthogonality_side="high"` the loss is over :math:`f_{ij} > \tau_j`.

    The weight of 10,000 in the source suits its toy data, where a feature explains a squared error
    of about 20. The source does not say whether the squared error is summed or averaged over d_in;
    on its data with a parent feature, both give clean latents.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        orthogonality_coefficient: Weight of the loss; 0 turns it off.
        orthogonality_threshold_share: The threshold tau_j, as a share of the largest recent
            activation of latent j.
        orthogonality_window: Number of batches that count as recent.
        orthogonality_side: Whether `low` or `high` activations are penalised.
        orthogonality_threshold: `share`, as above; or `mixture`, the point between the two peaks
            of a latent's activations where it has two peaks, and the share where it has not.
        kwargs: Arguments of `SparseAutoencoder`.

    Attributes:
        orthogonality_scale: Factor of both the weight and the threshold, from 0 to 1;
            `AuxThresholdWarmup` changes it.
        peaks: The recent activations of the latents and their thresholds; None without the loss.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        *,
        orthogonality_coefficient: float = 0.0,
        orthogonality_threshold_share: float = 0.7,
        orthogonality_window: int = 50,
        orthogonality_side: Literal["low", "high"] = "low",
        orthogonality_threshold: Literal["share", "mixture"] = "share",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.save_hyperparameters()
        require_not_negative(orthogonality_coefficient=orthogonality_coefficient)
        require_positive(
            orthogonality_threshold_share=orthogonality_threshold_share,
            orthogonality_window=orthogonality_window,
        )
        require_one_of(("low", "high"), orthogonality_side=orthogonality_side)
        require_one_of(("share", "mixture"), orthogonality_threshold=orthogonality_threshold)
        if orthogonality_threshold_share > 1:
            refuse(
                "Expected argument `orthogonality_threshold_share` to be at most 1 but got "
                f"{orthogonality_threshold_share}: it is a share of the largest activation."
            )
        self.orthogonality_coefficient = orthogonality_coefficient
        self.orthogonality_side = orthogonality_side
        self.orthogonality_scale = 1.0
        kind = MixtureThreshold if orthogonality_threshold == "mixture" else PeakThreshold
        self.peaks = (
            kind(self.d_sae, orthogonality_threshold_share, orthogonality_window)
            if orthogonality_coefficient
            else None
        )

    def orthogonality(
        self, x: Float[Tensor, "batch d_in"], f: Code, v: Code | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """The auxiliary loss of a batch; empty if it is turned off.

        Args:
            x: Centred and scaled activations.
            f: Their latents.
            v: Pre-activations of the same entries; by default computed from `f`.
        """
        if self.peaks is None:
            return {}
        if self.training:
            self.peaks.note(f)
        if self.orthogonality_scale == 0:
            return {"orthogonality": x.new_zeros(())}
        v = self._pre_of(x, f) if v is None else v
        strong = self.peaks.strong(f, self.orthogonality_scale)
        cost = orthogonality(
            self.encoder_input(x),
            self.W_enc,
            v.with_values(v.values - v.at(self.b_enc)),
            strong,
            self.orthogonality_side,
        )
        return {"orthogonality": self.orthogonality_coefficient * self.orthogonality_scale * cost}

    def _pre_of(self, x: Tensor, f: Code) -> Code:
        """Pre-activations of latents: `f` itself, unless a subclass overrides `activate`."""
        own = not type(self).activate.__module__.startswith("lightning_sae.architectures.")
        if own and isinstance(f.pattern, DensePattern):
            return f.with_values(self.pre_activations(x))
        return f

    @override
    def training_step(self, batch: Float[Tensor, "batch d_in"], batch_idx: int) -> dict[str, Any]:
        """As in `SparseAutoencoder`, and update `peaks`."""
        if self.peaks is None:
            return super().training_step(batch, batch_idx)
        self.peaks.open()
        outputs = super().training_step(batch, batch_idx)
        self.peaks.close(self.trainer.strategy.reduce)
        self.log_dict({f"train/{name}": value for name, value in self.peaks.scalars().items()})
        return outputs
