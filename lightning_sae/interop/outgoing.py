"""Convert an SAE of this package for other libraries: folded, and in one of four plain forms."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sae.architectures import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    RescaledSAE,
    SparseAutoencoder,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.architectures.portable import folded_state
from lightning_sae.interop.found import fold_norms
from lightning_sae.interop.thresholds import just_below, rounded_down
from lightning_sae.tensors import not_finite

Form = Literal["relu", "threshold", "topk", "gated"]


class Outgoing(NamedTuple):
    r"""The function of an SAE on raw activations, with latents in their units.

    With :math:`v = (x - b_{dec}) W_{enc} + b_{enc}`, or without `b_dec` where the encoder does not
    subtract it:

    - `relu`: :math:`f = \mathrm{ReLU}(v)`
    - `threshold`: :math:`f = \mathrm{ReLU}(v) [v > \theta]`, a threshold of each latent
    - `topk`: :math:`f = \mathrm{ReLU}(\mathrm{TopK}(v, k))`
    - `gated`: :math:`f = [v > 0]\,\mathrm{ReLU}(e^{r_{mag}} (v - b_{enc}) + b_{mag})`

    Attributes:
        form: One of these four.
        name: Its class.
        weights: `W_enc` [d_in, d_sae], `b_enc`, `W_dec` [d_sae, d_in], `b_dec` and further weights
            of the form, all of one dtype.
        subtracts: Whether the encoder subtracts `b_dec`.
        source: As the SAE's.
        k: Latents per activation for `topk`; their average for `BatchTopKSAE`.
        prefixes: Prefixes of a `MatryoshkaSAE`, if fixed.
        has_own_thresholds: Whether thresholds differ between latents.
        notes: Descriptions of what was folded.
    """

    form: Form
    name: str
    weights: dict[str, Tensor]
    subtracts: bool
    source: dict[str, Any]
    k: float | None
    prefixes: tuple[int, ...] | None
    has_own_thresholds: bool
    notes: list[str]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.weights["W_dec"].shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.weights["W_dec"].shape[0]

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype, such as `float32`."""
        return str(self.weights["W_dec"].dtype).removeprefix("torch.")

    @property
    def units(self) -> str:
        """The units of the latents, in words."""
        norms = ", times the norm of its decoder row" if NORMS in self.notes else ""
        return f"raw: inputs are not scaled, and each latent is that of {self.name}.encode{norms}"

    def subtracting(self, wanted: bool) -> "Outgoing":
        """The same function, with or without `b_dec` subtracted from the encoder's input."""
        if wanted == self.subtracts:
            return self
        sign = 1 if wanted else -1
        weights = dict(self.weights)
        shift = sign * (weights["b_dec"].double() @ weights["W_enc"].double())
        weights["b_enc"] = (weights["b_enc"].double() + shift).to(weights["b_enc"].dtype)
        if self.form == "gated":  # its magnitudes do not see the bias of the gate
            moved = weights["b_mag"].double() + weights["r_mag"].double().exp() * shift
            weights["b_mag"] = moved.to(weights["b_mag"].dtype)
        how = "is now subtracted before it" if wanted else "is no longer subtracted before it"
        note = f"b_dec @ W_enc is folded into the encoder's bias, for b_dec {how}"
        return self._replace(weights=weights, subtracts=wanted, notes=[*self.notes, note])


@torch.no_grad()
def outgoing(
    sae: SparseAutoencoder, unit_decoder: bool = False, dtype: torch.dtype | None = None
) -> Outgoing:
    """Fold an SAE into one of the plain forms.

    Args:
        sae: The SAE.
        unit_decoder: Whether norms of decoder rows are folded into the encoder.
        dtype: dtype of the weights; by default the SAE's own.

    Raises:
        ValueError: If it has none of these forms, or its weights are not finite.
    """
    _require_own(sae)
    if isinstance(sae, RescaledSAE):
        sae = _with_scales_folded(sae)
    state = {name: weight.cpu() for name, weight in folded_state(sae).items()}
    bad = not_finite(state, dict(sae.named_buffers()))
    if bad:
        raise ValueError(f"The SAE is not exported, for {', '.join(bad)} are not finite.")
    notes = []
    if bool(sae.input_mean.any()) or float(sae.input_scale) != 1.0:
        notes.append("centring and scaling of the inputs are folded into biases and thresholds")
    form = _form(sae)
    weights = _weights(sae, state, form)
    if unit_decoder:
        _require_same_choice(form)
        weights = fold_norms(weights)
        notes.append(NORMS)
    dtype = dtype or weights["W_dec"].dtype
    weights = {name: _as(name, weight, sae, dtype) for name, weight in weights.items()}
    prefixes = sae.prefixes if isinstance(sae, MatryoshkaSAE) else None
    one_for_all = isinstance(sae, BatchTopKSAE) and not unit_decoder
    return Outgoing(
        form=form,
        name=type(sae).__name__,
        weights=weights,
        subtracts=sae.apply_b_dec_to_input,
        source=sae.source,
        k=sae.k if isinstance(sae, TopKSAE | BatchTopKSAE) and form != "relu" else None,
        prefixes=prefixes if isinstance(prefixes, tuple) else None,
        has_own_thresholds=form == "threshold" and not one_for_all,
        notes=notes,
    )


NORMS = "the norms of decoder rows are folded into the encoder"
OWN = (
    ReLUSAE, TiedSAE, GatedSAE, JumpReLUSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE,
    RescaleAndShiftSAE, RescaledSAE,
)  # fmt: skip


def _require_own(sae: SparseAutoencoder) -> None:
    computes = (type(sae).activate, type(sae).encoder_input, type(sae).encoder_origin)
    theirs = [f.__qualname__ for f in computes if not f.__module__.startswith("lightning_sae.arch")]
    if not isinstance(sae, OWN) or theirs:
        raise ValueError(
            f"Expected argument `sae` to be of an architecture of this package but "
            f"`{type(sae).__name__}` computes its own {', '.join(theirs) or 'latents'}, which "
            "other libraries do not know: save it with `save_pretrained`."
        )


def _with_scales_folded(sae: RescaledSAE) -> ReLUSAE:
    if (sae.scale <= 0).any():
        raise ValueError(
            "Expected argument `sae` to have positive scales, which go into the encoder, but some "
            "are not: export `sae.folded('decoder')`, whose latents are those before the scales."
        )
    return sae.folded("encoder")


def _form(sae: SparseAutoencoder) -> Form:
    if isinstance(sae, TopKSAE):
        return "topk"
    if isinstance(sae, GatedSAE):
        return "gated"
    if isinstance(sae, MatryoshkaSAE) and sae.uses_relu:
        return "relu"
    if isinstance(sae, TiedSAE):
        return "relu" if sae.threshold is None else "threshold"
    return "threshold" if isinstance(sae, JumpReLUSAE | BatchTopKSAE) else "relu"


def _weights(sae: SparseAutoencoder, state: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    weights = {name: state[name] for name in ("W_dec", "b_enc", "b_dec")}
    weights["W_enc"] = sae.W_enc.detach().cpu().contiguous()
    if isinstance(sae, GatedSAE):
        weights |= _magnitudes(sae, state)
    if form == "threshold":  # a negative threshold acts as 0, because latents are positive
        weights["threshold"] = state["threshold"].clamp(min=0.0).expand(sae.d_sae).contiguous()
    return weights


def _as(name: str, weight: Tensor, sae: SparseAutoencoder, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype; thresholds are converted for `>`, as `BatchTopKSAE` uses `>=`."""
    if name != "threshold":
        return weight.to(dtype)
    if not isinstance(sae, BatchTopKSAE):
        return rounded_down(weight, dtype)
    in_force = weight.to(dtype)  # torch compares with one number in the dtype of the many
    return torch.where(in_force > 0, just_below(in_force, dtype), 0.0).to(dtype)


def _magnitudes(sae: GatedSAE, state: dict[str, Tensor]) -> dict[str, Tensor]:
    r_mag, b_mag = state["r_mag"], state["b_mag"]
    if isinstance(sae, RescaleAndShiftSAE):  # strengths are of the gate's pre-activation
        if (b_mag < 0).any():
            raise ValueError(
                "Expected argument `sae` to have latents that are positive but `b_mag` of this "
                f"RescaleAndShiftSAE is negative for {int((b_mag < 0).sum())} of them: no other "
                "library has a gate without a ReLU behind it. Train it with `use_b_mag=False`."
            )
        b_mag = b_mag + r_mag.exp() * state["b_enc"]
    return {"r_mag": r_mag, "b_mag": b_mag}


def _require_same_choice(form: Form) -> None:
    if form == "topk":
        raise ValueError(
            "Expected argument `unit_decoder` to be false for a TopK SAE but got true: times the "
            "norms of its decoder rows, other pre-activations would be the largest. Its rows are "
            "of norm 1 if it was trained with `decoder_norm='unit'`."
        )
