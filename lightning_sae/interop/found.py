"""An SAE of another library, in the terms of this package."""

import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.interop.reading import refusal
from lightning_sae.interop.thresholds import just_above


class Found(NamedTuple):
    """The result of a reader, from which `portable.build` makes an SAE.

    Attributes:
        architecture: Name of the class.
        arguments: Arguments of the class, besides `d_in` and `d_sae`.
        weights: Weights by this package's names.
        source: Model, hook, text and the like, as far as the file states them.
        units: Units of the latents.
        guessed: What was guessed because the file does not state it.
        rest: Other metadata on its origin, kept for export.
    """

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    source: dict[str, Any]
    units: str
    guessed: list[str]
    rest: dict[str, Any]

    def described(self, format: str) -> dict[str, Any]:
        """Class, arguments and source, as `portable.build` takes them."""
        d_sae, d_in = self.weights["W_dec"].shape
        imported = {"format": format, "units": self.units, "guessed": self.guessed, **self.rest}
        source = {name: value for name, value in self.source.items() if value is not None}
        return {
            "architecture": self.architecture,
            "arguments": {"d_in": d_in, "d_sae": d_sae, **self.arguments},
            "source": {**source, "imported": imported},
        }


RAW = "raw: inputs are not scaled, and latents are those of the file"


def transposed(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "columns rows"]:
    """The transpose, as a contiguous copy."""
    return matrix.T.contiguous()


def of_one_dtype(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors in the longest dtype among them, except thresholds, which keep more digits."""
    own = [weight.dtype for name, weight in weights.items() if not name.startswith("threshold")]
    dtype = functools.reduce(torch.promote_types, own)
    return {n: w if n.startswith("threshold") else w.to(dtype) for n, w in weights.items()}


def free_rows(W_dec: Float[Tensor, "d_sae d_in"]) -> str:
    """The argument `decoder_norm` that fits a decoder: `unit` only if all rows have norm 1.

    With `unit`, further training would normalise the rows at once.
    """
    norms = W_dec.float().norm(dim=-1)
    slack = 8 * torch.finfo(W_dec.dtype).eps
    return "unit" if bool(((norms - 1).abs() <= slack).all()) else "free"


def fold_scale(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Convert weights for inputs times `scale` to weights for raw inputs; latents do not change.

    `W_enc' = W_enc * s`, `W_dec' = W_dec / s`, `b_dec' = b_dec / s`; biases of the encoder and
    thresholds are in the units of the latents.
    """
    changed = {
        "W_enc": weights["W_enc"] * scale,
        "W_dec": weights["W_dec"] / scale,
        "b_dec": weights["b_dec"] / scale,
    }
    return {**weights, **changed}


def fold_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale decoder rows to norm 1; latents and weights in their units are times the norms.

    Reconstructions do not change. A latent whose row is zero becomes zero.
    """
    norms = weights["W_dec"].double().norm(dim=-1)
    divisor = torch.where(norms > 0, norms, 1.0)
    latent = {n: (w.double() * norms).to(w.dtype) for n, w in weights.items() if n in IN_LATENTS}
    W_dec = (weights["W_dec"].double() / divisor.unsqueeze(-1)).to(weights["W_dec"].dtype)
    return {**weights, **latent, "W_dec": W_dec}


IN_LATENTS = ("W_enc", "b_enc", "b_mag", "threshold")
"""Names of weights in the units of the latents; `r_mag` is a ratio of two such."""


def with_window(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the unit of thresholds for further training, which files do not state."""
    dtype = torch.promote_types(weights["W_dec"].dtype, torch.float32)
    threshold = weights["threshold"].to(dtype)
    positive = threshold[threshold > 0]
    unit = positive.mean() if len(positive) else torch.ones((), dtype=dtype)
    return {**weights, "threshold": threshold, "threshold_unit": unit}


def from_on(threshold: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Convert thresholds for `>` to thresholds for `>=`; in float32 or more."""
    dtype = weights["W_enc"].dtype
    return just_above(threshold, dtype).to(torch.promote_types(dtype, torch.float32))


def own_source(config: dict[str, Any]) -> dict[str, Any]:
    """The source that this package wrote, if it exported the SAE; see `writing.origin`."""
    source = _own(config).get("source")
    return source if isinstance(source, dict) else {}


def own_units(config: dict[str, Any]) -> str | None:
    """The units of the latents that this package wrote, if it exported the SAE."""
    return text(_own(config).get("latents"))


def _own(config: dict[str, Any]) -> dict[str, Any]:
    own = config.get("lightning_sae")
    return own if isinstance(own, dict) else {}


def number(config: dict[str, Any], name: str, of: Path, default: float | None = None) -> float:
    """A finite positive number in a description.

    Raises:
        ValueError: If there is no such number.
    """
    value = config.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise refusal(of, f"its `{name}` is {value!r:.40}, not a positive number")
    return float(value)  # type: ignore[arg-type]


def whole(config: dict[str, Any], name: str, of: Path) -> int:
    """A positive integer in a description, which may be written as 32.0.

    Raises:
        ValueError: If it is not a positive integer.
    """
    value = number(config, name, of)
    if not value.is_integer():
        raise refusal(of, f"its `{name}` is {value:g}, and a row has a whole number of latents")
    return int(value)


def flag(config: dict[str, Any], name: str, of: Path, default: bool) -> bool:
    """A boolean in a description.

    Raises:
        ValueError: If it is something else.
    """
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise refusal(of, f"its `{name}` is {value!r:.40}, neither true nor false")
    return value


def part(config: dict[str, Any], name: str, of: Path) -> dict[str, Any]:
    """A dictionary in a description; empty if it is missing.

    Raises:
        ValueError: If it is something else.
    """
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise refusal(of, f"its `{name}` is {value!r:.40}, not a description")
    return value


def text(value: Any) -> str | None:
    """A string, or None for anything else."""
    return value if isinstance(value, str) and value else None


def require_sizes(of: Path, weights: dict[str, Tensor], **claimed: Any) -> None:
    """Raise a ValueError if shapes of weights do not match each other or the description.

    Args:
        of: Path of the file, for messages.
        weights: Weights by this package's names.
        claimed: `d_in` and `d_sae` in the description. If it uses another name, that follows two
            underscores: `d_sae__width`.
    """
    d_sae, d_in = weights["W_dec"].shape
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, weight in weights.items():
        if weight.dim() and tuple(weight.shape) != shapes.get(name, (d_sae,)):
            shape, whole = tuple(weight.shape), f"d_in={d_in} and d_sae={d_sae}"
            raise refusal(of, f"its decoder has {whole}, and {name} is of shape {shape}")
    for name, value in claimed.items():
        own = {"d_sae": d_sae, "d_in": d_in}[name.split("__")[0]]
        if value is not None and value != own:
            said = name.split("__")[-1]
            raise refusal(of, f"its `{said}` is {value!r:.40} but the weights are {own} wide")
