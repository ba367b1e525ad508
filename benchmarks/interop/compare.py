"""How much two libraries differ on the same activations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Side:
    """An SAE as one library computes it.

    Attributes:
        encode: Raw activations to latents.
        decode: Latents to raw activations.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """What came of one SAE.

    Attributes:
        library: The other library.
        sae: What it is, in words.
        l0: Mean number of latents that fire.
        latents: Largest difference of a latent, as a share of the largest latent.
        sets: Entries of the latents that are zero on one side alone.
        reconstruction: Largest difference of the reconstructions, as a share of the largest
            activation.
        note: Units of the latents, what was guessed; or why it was refused.
    """

    library: str
    sae: str
    l0: float | None = None
    latents: float | None = None
    sets: int | None = None
    reconstruction: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """`same`, `refused`, or `DIFFERENT`."""
        if self.latents is None or self.reconstruction is None:
            return "refused"
        alike = max(self.latents, self.reconstruction) <= TOLERANCE and self.sets == 0
        return "same" if alike and self.l0 else "DIFFERENT"


@torch.no_grad()
def compared(
    library: str, sae: str, one: Side, other: Side, x: Float[Tensor, "rows d_in"], note: str = ""
) -> Row:
    """The differences of two sides on activations `x`."""
    f, g = one.encode(x), other.encode(x)
    difference = (one.decode(f).float() - other.decode(g).float()).abs().max() / x.abs().max()
    f, g = f.float(), g.float()
    return Row(
        library,
        sae,
        l0=float((f != 0).sum(-1).float().mean()),
        latents=float((f - g).abs().max() / f.abs().max()),
        sets=int(((f != 0) != (g != 0)).sum()),
        reconstruction=float(difference),
        note=note,
    )
