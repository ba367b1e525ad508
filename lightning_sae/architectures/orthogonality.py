"""SAEs whose latents may be kept orthogonal to the inputs on which they fire weakly."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.peaks import MixtureThreshold, PeakThreshold
from lightning_sae.checks import (
    require_not_negative,
    require_one_of,
    require_positive,
)
from lightning_sae.functional.orthogonality import orthogonality
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.patterns import DensePattern


class WithOrthogonality(SparseAutoencoder):
    r"""An SAE that may have the auxiliary loss of activation orthogonality.

    .. math::
        L_{aux} = \tfrac{\lambda_{aux}}{B F} \sum_{i,j} [f_{ij} \le \tau_j]
        \cos(x_i - b_{dec}, W_{enc,j})^2

    Source: Chanin et al., Broken latents (2024), where it is divided by the number of latents, as
    here and unlike a penalty. The activations that they penalise are the low ones, which a latent
    owes to features that are not its main one. In narrow SAEs it is the high ones, where several
    features come together: with `orthogonality_side="high"` it is those with
    :math:`f_{ij} > \tau_j`.

    Their weight of 10,000 is taken over as it is. They do not say whether the squared error beside
    it is summed or averaged over d_in; their world with a parent gives clean latents either way. It
    belongs to the scale of these worlds, where a feature explains a squared error of about 20.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        orthogonality_coefficient: Weight of the loss; 0 for none.
        orthogonality_threshold_share: The threshold tau_j, as a share of the largest activation of
            latent j.
        orthogonality_window: Batches over which that is the largest.
        orthogonality_side: Whether `low` or `high` activations are penalised.
        orthogonality_threshold: `share` as above; or `mixture`, the crossing of the latent's two
            peaks where its activations have two, else the share.
        kwargs: Arguments of `SparseAutoencoder`.

    Attributes:
        orthogonality_scale: Share in force of both the weight and the threshold;
            `AuxThresholdWarmup` moves it.
        peaks: What is known of how strongly latents fire; None without the loss.

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
            raise ValueError(
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
        """The auxiliary loss of a batch, if one is asked for.

        Args:
            x: Centred and scaled activations.
            f: Their latents.
            v: Pre-activations of the same entries; by default they are worked out from `f`.
        """
        if self.peaks is None:
            return {}
        if self.training:
            self.peaks.note(f)
        if self.orthogonality_scale == 0:
            return {"orthogonality": x.new_zeros(())}
        v = self._pre_of(x, f) if v is None else v
        strong = f.values.detach() > f.at(self.orthogonality_scale * self.peaks.thresholds())
        cost = orthogonality(
            self.encoder_input(x),
            self.W_enc,
            v.with_values(v.values - v.at(self.b_enc)),
            strong,
            self.orthogonality_side,
        )
        return {"orthogonality": self.orthogonality_coefficient * self.orthogonality_scale * cost}

    def _pre_of(self, x: Tensor, f: Code) -> Code:
        """Active latents are their pre-activations, unless a subclass activates in its own way."""
        own = not type(self).activate.__module__.startswith("lightning_sae.architectures.")
        if own and isinstance(f.pattern, DensePattern):
            return f.with_values(self.pre_activations(x))
        return f

    @override
    def training_step(self, batch: Float[Tensor, "batch d_in"], batch_idx: int) -> dict[str, Any]:
        """As in `SparseAutoencoder`; takes note of how strongly latents fired."""
        if self.peaks is None:
            return super().training_step(batch, batch_idx)
        self.peaks.open()
        outputs = super().training_step(batch, batch_idx)
        self.peaks.close(self.trainer.strategy.reduce)
        self.log_dict({f"train/{name}": value for name, value in self.peaks.scalars().items()})
        return outputs
