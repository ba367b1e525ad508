"""BatchTopK SAE: a fixed number of latents on average, shared out over a batch."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.architectures.objective import Step
from lightning_sae.architectures.orthogonality import WithOrthogonality
from lightning_sae.checks import require_k
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import BatchTopK
from lightning_sae.functional.squared_error import squared_errors


class BatchTopKSAE(WithOrthogonality):
    r"""The k B largest pre-activations of a batch of B rows are its latents, where positive.

    .. math::
        f = \mathrm{ReLU}(\mathrm{BatchTopK}((x - b_{dec}) W_{enc} + b_{enc}, k B)), \quad
        L = \|x - \hat x\|^2 + \alpha \mathrm{Var}(x) L_{auxk} \quad \text{(mean over the batch)}

    Outside of training a row must not depend on its batch: latents are the pre-activations above
    `threshold`, a running mean of the smallest that was chosen in each batch. The batch is that of
    all ranks. As to `decoder_norm` see `TopKSAE`. Source: Bussmann et al., BatchTopK sparse
    autoencoders (2024).

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        k: Latents per activation on average; need not be whole.
        threshold_decay: What a batch leaves of the running mean; the first sets it.
        revive: See `SparseAutoencoder`.
        kwargs: Arguments of `WithOrthogonality` and `SparseAutoencoder`.

    Raises:
        ValueError: If a size or a rate is out of range, or k is not above 0 and up to `d_sae`.
    """

    threshold: Float[Tensor, ""]
    rows_are_independent = False
    latent_units = ("b_enc", "threshold")
    kept_in_float32 = ("threshold",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float = 32,
        threshold_decay: float = 0.99,
        revive: Literal["none", "auxk", "ghost"] = "auxk",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, revive=revive, **kwargs)
        self.save_hyperparameters()
        require_k(k, d_sae)
        self.k = k
        self.threshold_decay = threshold_decay
        # Below every pre-activation until a batch was seen: the positive ones are latents.
        self.register_buffer("threshold", torch.full((), -torch.inf))
        self.layout.dense = False  # a density that is known beforehand

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Positive pre-activations from the threshold on."""
        return pre.relu() * (pre >= self.threshold)

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """The largest of the batch, whatever the threshold."""
        f = self.code(x, BatchTopK(self.k, len(x), self.ranks.n, self.ranks.gathered))
        return f.with_values(f.values.relu())

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared error and the loss of dead latents, on centred and scaled activations."""
        f = self.latents(x)
        self.follow(f)
        x_hat = self.reconstruct(f)
        errors = squared_errors(x, x_hat)
        losses = {
            "squared_error": errors.mean(),
            **self.orthogonality(x, f),
            **self.revival(x, x_hat),
        }
        return Step(losses, f, x_hat, errors)

    @torch.no_grad()
    def follow(self, f: Code) -> None:
        """Have the threshold follow the smallest activation of a batch, that of all ranks."""
        active = torch.where(f.values > 0, f.values, torch.inf)
        smallest = active.min() if active.numel() else active.new_tensor(torch.inf)
        smallest = self.ranks.least(smallest)
        seen = torch.where(smallest.isfinite(), smallest, self.threshold)
        decay = torch.where(self.threshold.isfinite(), self.threshold_decay, 0.0)
        before = torch.where(self.threshold.isfinite(), self.threshold, 0.0)
        self.threshold.copy_(decay * before + (1 - decay) * seen)
