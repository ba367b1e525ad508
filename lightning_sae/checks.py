"""Checks of arguments and inputs: each error says what was expected, what came and the remedy."""

import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn


def require_positive(**values: int | float) -> None:
    """Raise a ValueError if an argument is not positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"Expected argument `{name}` to be positive but got {value}.")


def require_integers(**values: Any) -> None:
    """Raise a ValueError if an argument is no whole number; True and False are none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"Expected argument `{name}` to be a whole number but got {value!r}.")


def require_not_negative(**values: int | float) -> None:
    """Raise a ValueError if an argument is negative."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"Expected argument `{name}` to be at least 0 but got {value}.")


def require_k(k: Any, d_sae: int) -> None:
    """Raise a ValueError if there are not `k` latents to choose."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= d_sae:
        raise ValueError(
            f"Expected argument `k` to be above 0 and at most `d_sae`={d_sae} but got {k!r}."
        )


def require_one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raise a ValueError if an argument is not one of the allowed words."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(
                f"Expected argument `{name}` to be one of {allowed} but got {value!r}."
            )


def require_width(x: Any, d_in: int) -> None:
    """Raise a ValueError if `x` is no tensor or its last axis is not `d_in`."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"Expected a batch to be a tensor of activations but got a {type(x).__name__}: have "
            "the data loader give the tensor itself, as `DataLoader(tensor, batch_size=...)` does."
        )
    if x.shape[-1] != d_in:
        raise ValueError(
            f"Expected activations with last axis d_in={d_in} but got shape {tuple(x.shape)}: use "
            "the hook and model this SAE was built for."
        )


def require_finite(
    loss: Float[Tensor, ""],
    batch: Float[Tensor, "batch d_in"],
    step: int,
    sum_of_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> None:
    """Raise a FloatingPointError if `loss` is not finite, saying at which step and likely why.

    With several ranks the loss is that of all, so that all end here together.
    """
    if torch.isfinite(loss):
        return
    counts = torch.tensor([int((~torch.isfinite(batch)).any(-1).sum()), len(batch)])
    bad, total = sum_of_ranks(counts).tolist()
    cause = (
        f"{bad} of the batch's {total} activations are not finite: look at the model and its "
        "dtype, or drop outliers with `data.max_norm_multiple`"
        if bad
        else "the activations are finite: lower `lr` or raise `lr_warmup_steps`"
    )
    raise FloatingPointError(f"The loss is {loss.item()} at optimiser step {step}; {cause}.")


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
            "resumed like this is not the one that would have been.",
            stacklevel=2,
        )


def require_matching(sae: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Raise a ValueError if `checkpoint` is of another architecture or shape than `sae`."""
    architecture = checkpoint.get("lightning_sae", {}).get("architecture")
    if architecture != type(sae).__name__:
        raise ValueError(
            f"Expected a checkpoint of `{type(sae).__name__}` but it holds `{architecture}`: "
            "build the architecture it was made with, or give another `ckpt_path`."
        )
    own = {name: tuple(w.shape) for name, w in sae.state_dict().items()}
    its = {name: tuple(w.shape) for name, w in checkpoint["state_dict"].items()}
    if own != its:
        names = sorted(n for n in own.keys() | its.keys() if own.get(n) != its.get(n))
        pairs = ", ".join(f"{n} {own.get(n)} against {its.get(n)}" for n in names)
        raise ValueError(
            f"The checkpoint's shapes differ from this SAE's ({pairs}): "
            "set the `d_in` and `d_sae` it was made with, or give another `ckpt_path`."
        )


def refuse_second(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError if the trainer has another callback of the kind of `callback`."""
    kind = type(callback)
    if sum(isinstance(other, kind) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected one `{kind.__name__}` but the trainer has several: remove all but one."
        )


def expect(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError about the argument `name` unless `holds`."""
    if not holds:
        raise ValueError(f"Expected argument `{name}` to be {expected} but got {value}.")
