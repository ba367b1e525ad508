"""Whether a checkpoint or a trained SAE fits the present SAE and data."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def compare_sources(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise a ValueError if the hooks of a checkpoint and of the data differ; warn of the rest."""
    hooks = saved.get("hook_name"), present.get("hook_name")
    if None not in hooks and hooks[0] != hooks[1]:
        raise ValueError(
            f"Expected argument `hook_name` to be {hooks[0]}, at which the checkpoint was trained, "
            f"but got {hooks[1]}: set that hook, or give another `ckpt_path`."
        )
    both = saved.keys() & present.keys()
    changed = [f"{k} {saved[k]} to {present[k]}" for k in sorted(both) if saved[k] != present[k]]
    if changed:
        warnings.warn(
            f"The data is not what the checkpoint was trained on ({'; '.join(changed)}); a run "
            "resumed like this differs from an uninterrupted one.",
            stacklevel=2,
        )


OF_ACTIVATIONS = (
    *("model", "model_revision", "model_dtype", "quantization", "hook_name", "head"),
    *("document_start", "separator", "pack", "keep_rest", "chat_roles", "drop_special_tokens"),
)
"""Keys of an SAE's `source` that determine its activations, except the text itself."""


def warn_of_other_activations(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Warn if an SAE is evaluated with another model or text processing than in training."""
    both = [name for name in OF_ACTIVATIONS if name in saved and name in present]
    changed = [f"{k} {saved[k]} to {present[k]}" for k in both if saved[k] != present[k]]
    if changed:
        warnings.warn(
            f"The SAE was trained on other activations ({'; '.join(changed)}): its figures are "
            "those of a transfer.",
            stacklevel=2,
        )


def require_matching(
    sae: nn.Module, checkpoint: dict[str, Any], split: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Raise a ValueError if `checkpoint` is of another architecture or shape than `sae`.

    `split` has the whole shapes of weights that `sae` holds in part.
    """
    architecture = checkpoint.get("lightning_sae", {}).get("architecture")
    if architecture != type(sae).__name__:
        raise ValueError(
            f"Expected a checkpoint of `{type(sae).__name__}` but it holds `{architecture}`: "
            "build the architecture it was made with, or give another `ckpt_path`."
        )
    whole = split or {}
    own = {name: _shape(w, whole.get(name)) for name, w in sae.state_dict().items()}
    its = {name: _shape(w) for name, w in checkpoint["state_dict"].items()}
    if own != its:
        names = sorted(n for n in own.keys() | its.keys() if own.get(n) != its.get(n))
        pairs = ", ".join(f"{n} {own.get(n)} against {its.get(n)}" for n in names)
        raise ValueError(
            f"The checkpoint's shapes differ from this SAE's ({pairs}): "
            "set the `d_in` and `d_sae` it was made with, or give another `ckpt_path`."
        )


def _shape(weight: Tensor, whole: tuple[int, ...] | None = None) -> str:
    """A weight's shape, or that of the `whole` of it, and a dtype that is not floating-point."""
    named = "" if weight.is_floating_point() else f" of {weight.dtype}"
    return f"{tuple(whole or weight.shape)}{named}"
