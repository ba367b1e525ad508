"""A rescaled and shifted ReLU as a gated SAE: the same function, with other parameters."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.architectures import GatedSAE, RescaleAndShiftSAE
from lightning_sae.loading import load


@torch.no_grad()
def as_gated(sae: RescaleAndShiftSAE) -> GatedSAE:
    r"""The gated SAE with the same gates and, where they are not negative, the same latents.

    A gated SAE has magnitudes :math:`\mathrm{ReLU}(e^r (\pi - b_{enc}) + b_{mag})`, a rescaled and
    shifted one :math:`e^r \pi + b'_{mag}`. With :math:`b_{mag} = b'_{mag} + e^r b_{enc}` they
    differ by the ReLU alone. All terms of the loss are then equal too, and both have the same
    stationary points: the gradient of one set of parameters is that of the other, times the
    Jacobian of this map, which is invertible.

    Args:
        sae: A rescaled and shifted SAE.
    """
    gated = GatedSAE(sae.d_in, sae.d_sae, apply_b_dec_to_input=sae.apply_b_dec_to_input)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "r_mag"):
        getattr(gated, name).copy_(getattr(sae, name))
    gated.b_mag.copy_(sae.b_mag + sae.r_mag.exp() * sae.b_enc)
    return gated.to(sae.W_dec.device).eval()


@torch.no_grad()
def against_gated(
    sae: RescaleAndShiftSAE, batches: Iterable[Float[Tensor, "batch d_in"]]
) -> dict[str, float]:
    """How far a trained SAE is from the gated one that it equals up to a ReLU.

    Args:
        sae: It, on raw activations.
        batches: Raw activations.

    Returns:
        `negative`, the share of firings with a negative magnitude, which the ReLU would remove;
        `fvu_as_gated`, the squared error of the gated SAE over variance.
    """
    gated = as_gated(sae)
    negative = firings = error = 0.0
    seen = []
    for x in batches:
        f = sae.encode(x)
        negative, firings = negative + float((f < 0).sum()), firings + float((f != 0).sum())
        error += float((x - gated(x)).square().sum().double())
        seen.append(x)
    x = torch.cat(seen)
    variance = float((x - x.mean(0)).square().sum().double())
    return {"negative": negative / max(1.0, firings), "fvu_as_gated": error / variance}


def equivalence(folder: Path, batches: Iterable[Float[Tensor, "batch d_in"]]) -> dict[str, Any]:
    """`against_gated` for each rescaled and shifted SAE with a shift in a folder of SAEs, by name.

    Args:
        folder: Of exported SAEs.
        batches: Raw activations.
    """
    held = list(batches)
    saes = {path.name: load(path) for path in sorted(folder.iterdir())}
    return {
        name: against_gated(sae, held)
        for name, sae in saes.items()
        if isinstance(sae, RescaleAndShiftSAE) and sae.b_mag.any()
    }
