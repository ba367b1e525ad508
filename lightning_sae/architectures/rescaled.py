"""A trained SAE with a scale for each latent, fine-tuned without a sparsity penalty."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.objective import Step
from lightning_sae.architectures.portable import read
from lightning_sae.architectures.relu import ReLUSAE
from lightning_sae.architectures.tied import TiedSAE
from lightning_sae.checks import require_one_of
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import Above
from lightning_sae.functional.squared_error import squared_errors

Method = Literal[
    "scale", "decoder", "unrotated_decoder", "encoder", "unrotated_encoder", "unrotated_all"
]

TRAINED: dict[str, tuple[str, ...]] = {
    "scale": ("scale",),
    "decoder": ("scale", "W_dec", "b_dec"),
    "unrotated_decoder": ("scale", "b_dec"),
    "encoder": ("scale", "W_enc", "b_enc"),
    "unrotated_encoder": ("scale", "b_enc"),
    "unrotated_all": ("scale", "b_enc", "b_dec"),
}
"""The weights that each method trains."""

TAKEN_OVER = ("lr", "betas", "clip_grad_norm", "dead_after", "chunk_rows")
"""Arguments that a fine-tuned copy has from the trained SAE."""

Rescaled = TypeVar("Rescaled", bound="RescaledSAE")


class RescaledSAE(SparseAutoencoder):
    r"""A trained ReLU SAE whose shrunk latents are rescaled, each by a trained scale.

    .. math::
        f_s = s \odot \mathrm{ReLU}((x - o) W_{enc} + b_{enc}), \quad
        \hat x = f_s W_{dec} + b_{dec}, \quad
        L = \|x - \hat x\|^2 \quad \text{(mean over the batch)}

    An L1 penalty shrinks latents, by lambda/2 for a single binary feature. This SAE is trained
    without a penalty, with scales s that start at 1. `method` says which weights are trained:

    - `scale`: s;
    - `decoder`: s, `W_dec`, `b_dec`;
    - `unrotated_decoder`: s, `b_dec`;
    - `encoder`: s, `W_enc`, `b_enc`;
    - `unrotated_encoder`: s, `b_enc`;
    - `unrotated_all`: s, `b_enc`, `b_dec`.

    The first three do not change which latents fire. For this, the encoder's origin o is a
    constant: `b_dec` of the trained SAE, or 0 if its encoder does not subtract `b_dec`. The latents
    are f_s. Source: Wright and Sharkey, Addressing feature suppression in SAEs (2024); its seventh
    method, the baseline, is to continue training the SAE itself.

    The source does not say whether decoder rows keep their norm. Here they are free by default,
    because without a penalty latents gain nothing by shrinking; a latent's total scale is then s
    times the norm of its row. With `decoder_norm="unit"` rows change in direction only.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        method: Which weights are trained.
        sae: Folder of the trained SAE, as `save_pretrained` writes it. In Python, `of` takes an SAE
            object instead.
        decoder_norm: `free`, or `unit` for decoder rows that keep norm 1.
        kwargs: Arguments of `SparseAutoencoder`. `apply_b_dec_to_input` and `b_dec_init` have no
            effect, and `revive` is refused.

    Raises:
        ValueError: If an argument is out of range, or if the trained SAE has no ReLU latents or
            other sizes; when training starts, if no trained SAE was given.

    Example:
        >>> sae = RescaledSAE.of(ReLUSAE(4, 8), "scale", lr=1e-3)
        >>> [name for name, weight in sae.named_parameters() if weight.requires_grad]
        ['scale']
    """

    scale: Float[Tensor, " d_sae"]
    origin: Float[Tensor, " d_in"]
    input_units = ("b_dec", "origin")
    rows_are_independent = True
    may_be_split = True

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        method: Method = "decoder",
        sae: str | Path | None = None,
        decoder_norm: Literal["unit", "free"] = "free",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, decoder_norm=decoder_norm, **kwargs)
        self.save_hyperparameters()
        self.hparams.pop("sae", None)  # the folder may be missing where this SAE is loaded
        require_one_of(tuple(TRAINED), method=method)
        require_one_of(("none",), revive=self.revive)
        self.method = method
        self.apply_b_dec_to_input = True  # as `origin`
        self.scale = nn.Parameter(torch.ones(self.d_sae))
        self.register_buffer("origin", torch.zeros(d_in))
        for name, weight in self.named_parameters():
            weight.requires_grad_(name in TRAINED[method])
        if sae is not None:
            self._take(read(Path(sae), ReLUSAE, TiedSAE))

    @classmethod
    def of(
        cls: type[Rescaled],
        sae: SparseAutoencoder,
        method: Method = "decoder",
        **arguments: Any,
    ) -> Rescaled:
        """A copy of a trained SAE for fine-tuning, which initially computes the same function.

        Args:
            sae: A `ReLUSAE`, or a `TiedSAE` without thresholds; its copy is not tied.
            method: Which weights are trained.
            arguments: Arguments of `SparseAutoencoder`. By default `lr`, `betas`,
                `clip_grad_norm`, `dead_after` and `chunk_rows` are those of `sae`.

        Raises:
            ValueError: If `sae` has no ReLU latents, or an argument is out of range.
        """
        kept = {name: getattr(sae, name) for name in TAKEN_OVER}
        found = cls(sae.d_in, sae.d_sae, method, **{**kept, **arguments})
        found._take(sae)
        return found.to(sae.W_dec)

    @torch.no_grad()
    def _take(self, sae: SparseAutoencoder) -> None:
        _require_relu(sae)
        if (sae.d_in, sae.d_sae) != (self.d_in, self.d_sae):
            raise ValueError(
                f"Expected arguments `d_in` and `d_sae` to be {sae.d_in} and {sae.d_sae}, those of "
                f"the trained SAE, but got {self.d_in} and {self.d_sae}: set them so."
            )
        self.to(sae.W_dec.dtype)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "input_mean", "input_scale"):
            getattr(self, name).copy_(getattr(sae, name))
        if sae.apply_b_dec_to_input:
            self.origin.copy_(sae.b_dec)
        self.source, self.is_trained = dict(sae.source), True

    @override
    def encoder_origin(self) -> Float[Tensor, " d_in"]:
        """A constant, so that training `b_dec` does not change the encoder's input."""
        return self.origin

    @override
    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The positive part, times the scale."""
        return pre.relu() * self.scale

    @override
    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """The positive pre-activations, times the scale."""
        f = self.code(x, Above(0.0))
        return f.with_values(f.values * f.at(self.scale))

    @override
    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """The squared error only, on centred and scaled activations."""
        f = self.latents(x)
        x_hat = self.reconstruct(f)
        errors = squared_errors(x, x_hat)
        return Step({"squared_error": errors.mean()}, f, x_hat, errors)

    @override
    def on_train_start(self) -> None:
        """Raise a ValueError if the weights are random."""
        if not self.is_trained:
            raise ValueError(
                "Expected `RescaledSAE` to start from a trained SAE but it has random weights: "
                "build it with `RescaledSAE.of(sae, method)`, or give the argument `sae`."
            )
        super().on_train_start()

    @torch.no_grad()
    def folded(self, into: Literal["decoder", "encoder"] = "decoder") -> ReLUSAE:
        """A plain `ReLUSAE` with the same reconstructions, with the scales folded into its weights.

        Args:
            into: `decoder` multiplies the rows of `W_dec`; the latents are then those without the
                scales. `encoder` multiplies the columns of `W_enc` and `b_enc`; the latents are
                then those of this SAE, and all scales have to be positive.

        Raises:
            ValueError: If `into` is `encoder` and a scale is not positive.
        """
        require_one_of(("decoder", "encoder"), into=into)
        W_enc, b_enc, W_dec = self.W_enc, self.b_enc, self.W_dec
        if into == "decoder":
            W_dec = self.scale.unsqueeze(-1) * W_dec
        else:
            _require_positive(self.scale)
            W_enc, b_enc = W_enc * self.scale, b_enc * self.scale
        kept = {name: getattr(self, name) for name in TAKEN_OVER}
        centred = torch.equal(self.origin, self.b_dec)  # else the bias stands in for the origin
        found = ReLUSAE(
            self.d_in, self.d_sae, 0.0, decoder_norm="free", apply_b_dec_to_input=centred, **kept
        ).to(self.W_dec)
        weights = {
            "W_enc": W_enc,
            "b_enc": b_enc if centred else b_enc - self.origin @ W_enc,
            "W_dec": W_dec,
            "b_dec": self.b_dec,
            "input_mean": self.input_mean,
            "input_scale": self.input_scale,
        }
        for name, values in weights.items():
            getattr(found, name).copy_(values)
        found.source, found.is_trained = dict(self.source), True
        return found.train(self.training)


def _require_relu(sae: SparseAutoencoder) -> None:
    plain = type(sae).activate in (ReLUSAE.activate, TiedSAE.activate)
    if not plain or (isinstance(sae, TiedSAE) and sae.threshold is not None):
        raise ValueError(
            "Expected argument `sae` to have ReLU latents but got a "
            f"{type(sae).__name__}: give a `ReLUSAE`, or a `TiedSAE` without thresholds."
        )


def _require_positive(scale: Float[Tensor, " d_sae"]) -> None:
    n = int((scale <= 0).sum())
    if n:
        raise ValueError(
            f"Expected all scales to be positive, to be folded into the encoder, but {n} of "
            f"{len(scale)} are not, and a ReLU has no such latents: fold into the decoder."
        )
