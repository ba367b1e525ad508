"""Matryoshka SAE: every prefix of the latents is itself an SAE."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.batch_topk import BatchTopKSAE
from lightning_sae.architectures.objective import Step
from lightning_sae.architectures.threshold import ThresholdCalibration
from lightning_sae.checks import refuse, require_at_least, require_not_negative
from lightning_sae.functional.penalties import L1, Penalty, batch_penalty
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.selection import Above
from lightning_sae.functional.squared_error import squared_errors
from lightning_sae.functional.waiting import Remembered


class MatryoshkaSAE(BatchTopKSAE):
    r"""Nested reconstructions: prefixes of the latents reconstruct the input, too.

    .. math::
        \hat x_m = \sum_{j < m} f_j W_{dec,j} + b_{dec}, \quad
        L = \tfrac{1}{|M|} \sum_{m \in M} \|x - \hat x_m\|^2 + \dots
        \quad \text{(mean over the batch)}

    with one set of latents for all prefixes, chosen as in `BatchTopKSAE`, or with `k` null by a
    ReLU and a penalty as in `ReLUSAE`. Each latent is decoded once, because the reconstruction of a
    longer prefix adds to that of the shorter one. Sources: Bussmann et al., Learning multi-level
    features with Matryoshka SAEs (2025), for fixed prefixes; Nabeshima, Matryoshka sparse
    autoencoders (2024), for random ones.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        prefixes: Widths of the prefixes, increasing up to `d_sae`; or their number, and each batch
            draws new widths, uniform on a logarithmic scale and always including `d_sae`.
        k: Active latents per activation on average, or null for a ReLU.
        l1_coefficient: Weight of the penalty, if `k` is null.
        penalty: Its function, one of `lightning_sae.functional.penalties`; `L1` by default.
        kwargs: Arguments of `BatchTopKSAE`.

    Raises:
        ValueError: If an argument is out of range, or prefixes do not increase up to `d_sae`.
    """

    draws: Int[Tensor, ""]

    may_be_split = True
    deals_latents = True

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        prefixes: Sequence[int] | int = 5,
        k: float | None = 32,
        l1_coefficient: float = 1.0,
        penalty: Penalty | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k=1 if k is None else k, **kwargs)
        self.save_hyperparameters()
        require_not_negative(l1_coefficient=l1_coefficient)
        _check_prefixes(prefixes, self.d_sae)
        self.prefixes = prefixes if isinstance(prefixes, int) else tuple(prefixes)
        self.uses_relu = k is None
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._draws = Remembered()
        self.l1_coefficient, self.penalty = l1_coefficient, penalty or L1()
        is_own = type(self).objective is MatryoshkaSAE.objective
        self.rows_are_independent = is_own and self.uses_relu and not isinstance(prefixes, int)
        self.coefficient_name = "l1_coefficient" if self.uses_relu else None
        self.layout.dense = self.uses_relu

    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """As in `BatchTopKSAE`, or the positive part."""
        return pre.relu() if self.uses_relu else super().activate(pre)

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """The latents of all prefixes."""
        return self.code(x, Above(0.0)) if self.uses_relu else super().latents(x)

    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Squared errors of all prefixes, and penalty, on centred and scaled activations."""
        f = self.latents(x)
        if not self.uses_relu:
            self.follow(f)
        x_hats = self.nested(f, self._widths())
        errors = [squared_errors(x, x_hat) for x_hat in x_hats]
        losses = {
            "squared_error": torch.stack(errors).mean(),
            **self.orthogonality(x, f),
            **self.revival(x, x_hats[-1]),
        }
        if self.uses_relu:
            cost = self.parts.sum(batch_penalty(self.penalty, f, self.penalty_norms()))
            losses["l1"] = self.weight_of_penalty() * cost
        return Step(losses, f, x_hats[-1], errors[-1])

    @override
    def configure_callbacks(self) -> list[Callback]:
        """As in the base class; a ReLU has no threshold to set."""
        brought = super().configure_callbacks()
        calibrates = not self.uses_relu
        return [c for c in brought if calibrates or not isinstance(c, ThresholdCalibration)]

    def nested(self, f: Code, widths: Sequence[int]) -> list[Float[Tensor, "batch d_in"]]:
        """The reconstruction from each prefix."""
        latents = self.parts.indices(self.d_sae, self.device)
        ring = torch.zeros_like(latents, dtype=torch.int32)
        for width in widths:  # not as a tensor, whose copy to a GPU would wait for it
            ring += latents >= width
        x_hat, found = self.b_dec, []
        for part in f.parted(ring, len(widths)):
            x_hat = x_hat + self.decoded(part, self.W_dec)
            found.append(x_hat)
        return found

    def _widths(self) -> Sequence[int]:
        if not isinstance(self.prefixes, int):
            return self.prefixes
        # Seeded by a count in the checkpoint, so it is the same on all ranks and after a resume.
        draws = int(self._draws.of(self.draws))
        generator = torch.Generator().manual_seed(draws)
        self.draws += 1
        self._draws.note(self.draws, draws + 1)
        shares = torch.rand(self.prefixes - 1, generator=generator)
        drawn = (self.d_sae**shares).long().clamp(1, self.d_sae)
        return sorted({*drawn.tolist(), self.d_sae})


def _check_prefixes(prefixes: Sequence[int] | int, d_sae: int) -> None:
    if isinstance(prefixes, int):
        require_at_least(1, prefixes=prefixes)
        return
    widths = list(prefixes)
    if not widths or sorted(set(widths)) != widths or widths[0] < 1 or widths[-1] != d_sae:
        refuse(
            f"Expected argument `prefixes` to rise from 1 or more up to `d_sae`={d_sae} but got "
            f"{widths}: end it with {d_sae}."
        )
