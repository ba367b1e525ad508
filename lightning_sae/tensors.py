"""Checks of tensors: activations and latents that an SAE is given, and its weights."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
"""Dtypes in which activations can be computed with."""

PIECE = 2**24
"""Entries of a weight that are looked at together."""


def require_width(x: Any, d_in: int) -> None:
    """Raise a ValueError if `x` is not a tensor of activations [..., d_in]."""
    _require_tensor(x, "a batch to be a tensor of activations", "activations")
    if x.shape[-1:] != (d_in,):
        raise ValueError(
            f"Expected activations with last axis d_in={d_in} but got shape {tuple(x.shape)}: use "
            "the hook and model this SAE was built for."
        )


def require_latents(f: Any, d_sae: int) -> None:
    """Raise a ValueError if `f` is not a tensor of latents [..., d_sae]."""
    _require_tensor(f, "a tensor of latents", "latents")
    if f.shape[-1:] != (d_sae,):
        raise ValueError(
            f"Expected latents with last axis d_sae={d_sae} but got shape {tuple(f.shape)}: give "
            "what `encode` of this SAE gives."
        )


def _require_tensor(x: Any, expected: str, named: str) -> None:
    """Raise a ValueError if `x` is not an ordinary tensor of real numbers."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"Expected {expected} but got a {type(x).__name__}: have the data loader give the "
            "tensor itself, as `DataLoader(tensor, batch_size=...)` does."
        )
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise ValueError(f"Expected {named} as a dense tensor but got a {layout} one: convert it.")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"Expected {named} of a floating-point dtype but got {x.dtype}: convert them, as "
            "`x.float()` does."
        )


def require_on(device: torch.device, x: Tensor, named: str) -> None:
    """Raise a ValueError if `x` is not on the device of the SAE's weights."""
    if x.device == device:
        return
    remedy = "move them there, as `x.to(sae.device)` does"
    if device.type == "meta":
        remedy = "build the SAE outside of `torch.device('meta')`, so that its weights have values"
    elif x.is_meta:
        remedy = "give a tensor that has values"
    raise ValueError(
        f"Expected {named} on the device of the SAE's weights, {device}, but got them on "
        f"{x.device}: {remedy}."
    )


def require_batch(x: Any, d_in: int) -> None:
    """Raise a ValueError if `x` is not a batch [batch, d_in] of floating-point activations."""
    require_width(x, d_in)
    if x.is_meta:
        raise ValueError("Expected a batch with values but got one on the device `meta`.")
    if x.dim() != 2:
        raise ValueError(
            f"Expected a batch of shape [batch, d_in] but got {tuple(x.shape)}: have the data "
            "loader give rows, as `x.reshape(-1, d_in)` makes them."
        )


def not_finite(weights: Mapping[str, Tensor], buffers: Collection[str] | None = None) -> list[str]:
    """Names of the weights that are not finite.

    Args:
        weights: Tensors by name.
        buffers: Names of tensors that may be -inf, such as a threshold below all values; by default
            all that are not matrices.
    """
    return sorted(name for name, weight in weights.items() if _is_bad(name, weight, buffers))


def _is_bad(name: str, weight: Tensor, buffers: Collection[str] | None) -> bool:
    if not weight.is_floating_point():
        return False
    may_be_low = weight.dim() < 2 if buffers is None else name in buffers
    ordered = weight if weight.is_contiguous() or weight.dim() < 2 else weight.mT
    # Piece by piece, because comparing all of a large dictionary takes as much memory again.
    return any(
        not torch.isfinite(piece).all()
        and not (may_be_low and (torch.isfinite(piece) | (piece == -torch.inf)).all())
        for piece in ordered.reshape(-1).split(PIECE)
    )
