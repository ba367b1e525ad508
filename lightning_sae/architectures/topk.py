"""TopK SAE: a fixed number of latents for every activation."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.objective import Step
from lightning_sae.checks import require_integers, require_k
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import TopK
from lightning_sae.functional.squared_error import squared_errors


class TopKSAE(SparseAutoencoder):
    r"""The k largest positive pre-activations of each row are its active latents.

    .. math::
        f = \mathrm{ReLU}(\mathrm{TopK}((x - b_{dec}) W_{enc} + b_{enc}, k)), \quad
        L = \|x - \hat x\|^2 + \alpha \mathrm{Var}(x) L_{auxk} \quad \text{(mean over the batch)}

    There is no penalty. The loss `lightning_sae.functional.revival.auxk` trains dead latents. As
    nothing penalises strong latents, decoder norms may be free (`decoder_norm="free"`), which finds
    more features of toy data. Latents are then still chosen by their pre-activations, so that their
    scale matters although a decoder row can undo it; training uses it like a threshold per latent.
    Choosing by the pre-activation times the norm of the decoder row, as SAELens does, finds fewer
    features (`docs/studies.md`). Source: Gao et al., Scaling and evaluating sparse autoencoders
    (2024).

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        k: Active latents per activation.
        revive: See `SparseAutoencoder`.
        kwargs: Arguments of `SparseAutoencoder`.

    Raises:
        ValueError: If a size or a rate is out of range, or k is not from 1 to `d_sae`.
    """

    rows_are_independent = True
    may_be_split = True
    latents_follow_activate = True

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        k: int = 32,
        revive: Literal["none", "auxk", "ghost"] = "auxk",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, revive=revive, **kwargs)
        self.save_hyperparameters()
        require_integers(k=k)
        require_k(k, self.d_sae)
        self.k = k
        self.layout.dense = False  # the density is known

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The k largest positive pre-activations of each row."""
        rows = pre.reshape(-1, pre.shape[-1])
        values, latents = TopK(self.k, self.parts).largest(rows)
        return torch.zeros_like(rows).scatter(-1, latents, values.relu()).view_as(pre)

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """The same, as a sparse code; the latents of `activate` where a subclass overrides it."""
        if type(self).activate is not TopKSAE.activate:
            return super().latents(x)
        f = self.code(x, TopK(self.k, self.parts))
        return f.with_values(f.values.relu())

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared error and the loss of dead latents, on centred and scaled activations."""
        f = self.latents(x)
        x_hat = self.reconstruct(f)
        errors = squared_errors(x, x_hat)
        losses = {
            "squared_error": errors.mean(),
            **self.revival(x, x_hat),
        }
        return Step(losses, f, x_hat, errors)
