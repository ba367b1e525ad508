"""Checks of arguments and inputs: each error says what was expected, what came and the remedy."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.files import UNFINISHED, not_finite

_NOTED: ContextVar[list[str] | None] = ContextVar("noted", default=None)


def refuse(message: str) -> None:
    """Raise a ValueError about an argument, or note it inside `all_at_once`."""
    noted = _NOTED.get()
    if noted is None:
        raise ValueError(message)
    if message not in noted:
        noted.append(message)


def is_noted() -> bool:
    """Whether something was noted inside `all_at_once`."""
    return bool(_NOTED.get())


@contextmanager
def all_at_once() -> Iterator[None]:
    """Note all bad arguments inside, and raise one ValueError with a line for each.

    If something else fails after the first of them, it is taken for its consequence and not shown,
    unless it is about an argument too.
    """
    noted: list[str] = []
    token = _NOTED.set(noted)
    try:
        yield
    except Exception as error:
        if not noted:
            raise
        last = str(of_ours(error))
        named = last.startswith(("Expected argument", "Member `"))
        noted += [last] if named and last not in noted else []
    finally:
        _NOTED.reset(token)
    if noted:
        raise ValueError("\n".join(noted))


def of_ours(error: Exception) -> Exception:
    """The original error, if jsonargparse has wrapped it in one that shows all arguments."""
    while isinstance(error.__cause__, ValueError) and "Given value" in str(error):
        if chosen := _of_subtypes(str(error)):
            return ValueError(chosen)
        error = error.__cause__
    return error


def _of_subtypes(message: str) -> str | None:
    """Of the errors that jsonargparse lists for the types of a union, the one about an argument.

    The cause of such an error is that of the first type, which may be another than was meant.
    """
    listed = message.partition("\nErrors:\n  - ")[2].partition("\nGiven value")[0]
    errors = [each.replace("\n    ", "\n") for each in listed.split("\n  - ")]
    return next((e for e in errors if e.startswith(("Expected argument", "Member `"))), None)


def require_positive(**values: int | float) -> None:
    """Raise a ValueError if an argument is not positive."""
    for name, value in values.items():
        if not value > 0:  # nor not a number
            refuse(f"Expected argument `{name}` to be positive but got {value}.")


def require_integers(**values: Any) -> None:
    """Raise a ValueError if an argument is not an integer; True and False are refused."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            refuse(f"Expected argument `{name}` to be a whole number but got {value!r}.")


def require_not_negative(**values: int | float) -> None:
    """Raise a ValueError if an argument is negative."""
    require_at_least(0, **values)


def require_at_least(least: float, **values: int | float | None) -> None:
    """Raise a ValueError if an argument is below `least`; None, a default, is accepted."""
    for name, value in values.items():
        if value is not None and not value >= least:
            refuse(f"Expected argument `{name}` to be at least {least} but got {value}.")


def require_between(least: float, most: float, **values: float | Tensor) -> None:
    """Raise a ValueError if a number is not finite or out of bounds."""
    for name, value in values.items():
        numbers = torch.as_tensor(value)
        wrong = numbers[~((numbers >= least) & (numbers <= most) & numbers.isfinite())]
        if len(wrong):
            refuse(
                f"Expected argument `{name}` to be from {least} to {most} but got "
                f"{wrong[0].item():g}."
            )


def require_k(k: Any, d_sae: int) -> None:
    """Raise a ValueError unless 0 < `k` <= `d_sae`."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= d_sae:
        refuse(f"Expected argument `k` to be above 0 and at most `d_sae`={d_sae} but got {k!r}.")


def require_one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raise a ValueError if an argument is not one of the allowed words."""
    for name, value in values.items():
        if value not in allowed:
            refuse(f"Expected argument `{name}` to be one of {allowed} but got {value!r}.")


def require_types(kind: type, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if arguments do not match the annotations of a class and its bases.

    For arguments read from a file: plain values, and tuples of them.
    """
    for name, value in arguments.items():
        for base in kind.__mro__:
            parameters = inspect.signature(base).parameters if "__init__" in vars(base) else {}
            if name in parameters:
                expected = parameters[name].annotation
                expect(_is_of(value, expected), name, f"of type {expected}", repr(value))
                break


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type; always true for types that are not plain."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list, Sequence):
        if not isinstance(value, tuple | list):
            return False
        fixed = origin is tuple and Ellipsis not in parts
        each = parts if fixed else parts[:1] * len(value)
        return len(value) == len(each) and all(map(_is_of, value, each))
    if kind in (bool, str, NoneType):
        return isinstance(value, kind)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind is float or float(value).is_integer())
    return True


DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
"""Dtypes in which activations can be computed with."""


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


def require_trainable_norm(norm: float, dtype: torch.dtype, step: float) -> None:
    """Refuse activations whose gradients overflow, and warn of those shorter than a step.

    Args:
        norm: Root mean square norm of the first batch's centred and scaled activations.
        dtype: Of the weights.
        step: Distance by which the first steps of Adam move a point among the activations.

    Raises:
        FloatingPointError: If squares of gradients are not finite in `dtype`.
    """
    # A gradient is about as large as a squared norm, and Adam squares it.
    if norm > torch.finfo(dtype).max ** 0.25:
        raise FloatingPointError(
            f"The activations of the first batch are of norm {norm:.3g}, and {dtype} cannot hold "
            "the squares of their gradients, so nothing would be learnt: look at the model, or "
            "scale them with `data.scale`."
        )
    if 0 < norm < step:
        warnings.warn(
            f"The activations of the first batch are of norm {norm:.3g}, and the first steps of "
            f"Adam move `b_dec` by up to {step:.3g} each: scale them with `data.scale`, or lower "
            "`lr`.",
            stacklevel=2,
        )


def require_one_loader(dataloader_idx: int) -> None:
    """Raise a ValueError if there are several held-out loaders, whose metrics would be mixed."""
    if dataloader_idx:
        raise ValueError(
            "Expected one loader of held-out activations but got several, and metrics are those of "
            "one: call `trainer.validate` or `trainer.test` once for each."
        )


def require_betas(betas: Any) -> None:
    """Raise a ValueError unless `betas` are two numbers of at least 0 and below 1."""
    numbers = isinstance(betas, tuple | list) and len(betas) == 2
    if not numbers or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
        refuse(
            "Expected argument `betas` to be two numbers of at least 0 and below 1 but got "
            f"{betas!r}."
        )


def require_a_batch(n_batches: float) -> None:
    """Raise a ValueError if there is no batch to train on."""
    if n_batches == 0:
        raise ValueError(
            "The training data gave no batch, so nothing was trained: give more activations, or "
            "smaller batches without `drop_last`."
        )


@runtime_checkable
class Reduces(Protocol):
    """Reductions over all ranks; see `lightning_sae.distributed.ranks.Ranks`."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""

    def least(self, value: Tensor) -> Tensor:
        """The minimum over all ranks, elementwise."""


def require_finite(
    loss: Float[Tensor, ""],
    losses: Mapping[str, Float[Tensor, ""]],
    x: Float[Tensor, "batch d_in"],
    module: nn.Module,
    step: int,
    ranks: Reduces,
) -> None:
    """Raise a FloatingPointError with step and likely cause if the loss is not finite.

    Args:
        loss: The loss, reduced over all ranks so that all of them raise.
        losses: The terms of the loss by name.
        x: The batch as passed to the objective.
        module: The module in training.
        step: Optimizer steps taken.
        ranks: The ranks that share the batch.
    """
    if torch.isfinite(loss):
        return
    terms = ", ".join(name for name, value in losses.items() if not torch.isfinite(value))
    where = f" in {terms}" if terms else ""
    cause = _cause(terms, x, module, torch.finfo(x.dtype).max ** 0.25, ranks)
    raise FloatingPointError(f"The loss is {loss.item()}{where} at optimizer step {step}; {cause}.")


def _cause(
    terms: str, x: Float[Tensor, "batch d_in"], module: nn.Module, large: float, ranks: Reduces
) -> str:
    """The likely cause of a loss that is not finite: activations, weights or a coefficient."""
    counts = torch.tensor([int((~torch.isfinite(x)).any(-1).sum()), len(x)])
    bad, total = ranks.sum(counts).tolist()
    if bad:
        return (
            f"{bad} of the batch's {total} activations are not finite: look at the model and its "
            "dtype, or drop outliers with `data.max_norm_multiple`"
        )
    largest = torch.stack([weight.detach().abs().max().double() for weight in module.parameters()])
    norms = x.double().square().sum(-1).mean().sqrt()
    norm, weight = (-ranks.least(-torch.stack([norms, largest.max()]))).tolist()
    if norm > large and not weight >= norm:  # on a GPU the weights may be NaN already
        return (
            f"the activations are finite, but of norm {norm:.3g}, and {x.dtype} cannot hold what "
            "is made of their squares: look at the model, scale them with `data.scale`, drop "
            "outliers with `data.max_norm_multiple`, or train in a wider `trainer.precision`"
        )
    if not weight <= large:
        return (
            "the activations are finite: lower `lr` or raise `lr_warmup_steps`, for the weights "
            f"reach {weight:.3g}"
        )
    return (
        f"activations (of norm {norm:.3g}) and weights (up to {weight:.3g}) are finite: lower the "
        f"coefficient of {terms or 'the largest term'}, or `lr`"
    )


def require_finite_weights(
    module: nn.Module, step: int, on_any: Callable[[bool], tuple[bool, ...]] | None = None
) -> None:
    """Raise a FloatingPointError if weights are not finite after a step of training.

    Args:
        module: Has the weights.
        step: Optimizer steps taken.
        on_any: Whether something holds on any of the devices that share the weights.
    """
    bad = not_finite(module.state_dict(), dict(module.named_buffers()))
    if on_any is not None and on_any(bool(bad))[0] and not bad:
        bad = ["on another device"]
    if bad:
        raise FloatingPointError(
            f"The weights are not finite after optimizer step {step} ({', '.join(bad)}), and are "
            "not saved: lower `lr` or raise `lr_warmup_steps`."
        )


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


def refuse_second(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError if the trainer has another callback of the class of `callback`."""
    kind = type(callback)
    if sum(isinstance(other, kind) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected one `{kind.__name__}` but the trainer has several: remove all but one."
        )


def require_new_folder(name: str, folder: Path) -> None:
    """Raise a ValueError about the argument `name` if a folder holds files, or is a file."""
    files = [folder] if folder.is_file() else folder.glob("*")
    holds = any(not path.name.startswith(UNFINISHED) for path in files)
    expect(not holds, name, "a new or empty folder", f"{folder}, which holds files: choose another")


def expect(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError about the argument `name` unless `holds`."""
    if not holds:
        refuse(f"Expected argument `{name}` to be {expected} but got {value}.")
