"""Which settings apply on resume: those given now, or those of the checkpoint.

Each setting that affects the run is saved in the checkpoint. On resume, a changed setting either
applies from then on, with a message, or is refused. The table is in `docs/resuming.md`.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from lightning_sae.functional.penalties import plain_arguments
from lightning_sae.training.lengths import HasLengths, is_share, steps_of
from lightning_sae.training.optimizer import AUTO_DECAY

# Settings of an SAE that give its weights their meaning or are only used at the start of a run.
# Widths and architecture are compared with the weights, see `require_matching`. All others may
# change.
FIXED_IN_MODEL = {
    "apply_b_dec_to_input",
    "decoder_norm",
    "decoder_init_norm",
    "b_dec_init",
    "threshold_init",
}
# Settings of the package's data that may change. Text, model and hook are compared as the SAE's
# `source`, see `compare_sources`. All others are fixed, because they would change the buffer.
FREE_IN_DATA = {
    "prefetch",
    "buffer_device",
    "n_validation",
    "n_test",
    "largest_saved_buffer",
    "verify",
}
# Locations of the data; `source` tells whether it is the same data.
FREE_IN_DATA |= {"activations", "evaluation_model", "evaluation_text"}
SOURCE = {
    "model",
    "hook_name",
    "context_length",
    "drop_special_tokens",
    "positions",
    "max_norm_multiple",
    "text",
}
FIXED_IN_TRAINER = ("accumulate_grad_batches", "precision", "overfit_batches")
CHANGING_IN_TRAINER = (
    "max_steps",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
# Callbacks of the package that do not affect the weights.
WATCHING = {
    "ExportSAE",
    "HeldOutEvaluation",
    "Histograms",
    "LatentFigures",
    "LatentWriter",
    "RunCheckpoint",
    "RunOverview",
    "SAEProgressBar",
    "SaveConfig",
    "SplicedLossMonitor",
    "StepMonitor",
    "StreamMonitor",
    "ThresholdCalibration",
    "TopContexts",
}


class Setting(NamedTuple):
    """A plain value, and whether it may change on resume."""

    value: Any
    may_change: bool


Settings = dict[str, Setting]


def settings_of(
    trainer: Trainer,
    models: Mapping[str, LightningModule],
    callbacks: Mapping[str, Sequence[Callback]],
) -> Settings:
    """All settings of a run by dotted name.

    Args:
        trainer: The trainer of the run.
        models: SAEs, by the prefix of their settings' names.
        callbacks: Callbacks of the SAEs and of the run, by prefix.
    """
    found = _of_trainer(trainer)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None:
        found |= _of_data(data)
    for prefix, model in models.items():
        given = {k: v for k, v in plain_arguments(model.hparams).items() if k[0] != "_"}
        found |= {
            f"{prefix}{name}": Setting(value, name not in FIXED_IN_MODEL)
            for name, value in _flat(given)
        }
        found |= _of_shares(model, prefix, trainer.max_steps)
    for prefix, each in callbacks.items():
        found |= {f"{prefix}{name}": setting for name, setting in _of_callbacks(each).items()}
        for callback in each:
            whole = f"{prefix}callbacks.{type(callback).__name__}."
            found |= _of_shares(callback, whole, trainer.max_steps)
    return found


def note_settings(checkpoint: dict[str, Any], settings: Settings) -> None:
    """Save the values in a checkpoint."""
    checkpoint["settings"] = {name: setting.value for name, setting in settings.items()}


NEEDED_TO_RESUME = ("optimizer_states", "lr_schedulers", "loops", "callbacks")


def require_state_of_run(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Raise a ValueError if a run cannot continue from a checkpoint, as one of weights alone."""
    missing = [name for name in NEEDED_TO_RESUME if name not in checkpoint]
    missing += [name for name in ("optimizer_states", "loops") if checkpoint.get(name) in ([], {})]
    missing += [name for name in ("optimizer_states",) if _has_empty_state(checkpoint)]
    if missing:
        path = str(trainer.ckpt_path)
        raise ValueError(
            "Expected argument `ckpt_path` to be a checkpoint from which a run can continue but "
            f"{path} lacks {', '.join(missing)}: give another checkpoint, or start a new run from "
            f"its weights, `trainer.fit(lightning_sae.load({path!r}), data)`."
        )
    data = trainer.datamodule  # type: ignore[attr-defined]
    state = {} if data is None else checkpoint.get(type(data).__qualname__, {})
    if not isinstance(state, dict):
        raise ValueError(
            f"Could not read {trainer.ckpt_path}: its state of the data is {state!r:.40}. Give "
            "another checkpoint."
        )


def _has_empty_state(checkpoint: Mapping[str, Any]) -> bool:
    states = checkpoint.get("optimizer_states", [])
    return any(own == {} for state in states for own in state.get("state", {}).values())


def compare_settings(checkpoint: Mapping[str, Any], present: Settings, trainer: Trainer) -> None:
    """Report settings that differ from the checkpoint's; on resume, refuse fixed ones.

    Raises:
        ValueError: If one of them may not change, the run would end before the checkpoint's step,
            or the checkpoint lacks the state of a run.
    """
    if "settings" not in checkpoint or _is_of_tuner(trainer):
        return
    saved = _in_names_of(checkpoint["settings"], present)
    differing = [name for name, value in saved.items() if value != present[name].value]
    if trainer.state.fn == "fit":
        require_state_of_run(checkpoint, trainer)
        fixed = [name for name in differing if not present[name].may_change]
        _refuse(fixed, saved, present)
        _require_steps_left(checkpoint["global_step"], trainer.max_steps)
    else:
        differing = [name for name in differing if name.startswith(("model.", "members."))]
    if differing:
        lines = [f"  {name}: {present[name].value} (was {saved[name]})" for name in differing]
        rank_zero_info(
            "\n".join(["These settings are not the checkpoint's; the given ones apply:", *lines])
        )


def _in_names_of(saved: Mapping[str, Any], present: Settings) -> dict[str, Any]:
    """The saved values, by the names of the present ones.

    An object has settings below its name, where None has a value of that name. Settings without
    any counterpart, such as new arguments of a later version, are left out.
    """
    found = {name: saved[name] for name in present if name in saved}
    for name in present.keys() - found.keys():
        was_none = [o for o in saved if saved[o] is None and name.startswith(f"{o}.")]
        is_none = present[name].value is None
        below = [saved[other] for other in saved if is_none and other.startswith(f"{name}.")]
        if was_none or below:
            found[name] = ", ".join(map(str, below)) or None
    return {name: found[name] for name in present if name in found}


def _refuse(fixed: Sequence[str], saved: Mapping[str, Any], present: Settings) -> None:
    if not fixed:
        return
    pairs = "; ".join(f"`{n}` to be {saved[n]} but got {present[n].value}" for n in fixed)
    raise ValueError(
        f"Expected, as in the checkpoint, {pairs}: a run cannot continue with another value. Give "
        "the checkpoint's, or start a new run in another folder, from "
        "`lightning_sae.load(ckpt_path)` if it should start from these weights."
    )


def _require_steps_left(taken: int, max_steps: int) -> None:
    if 0 <= max_steps < taken:
        raise ValueError(
            f"Expected argument `trainer.max_steps` to be at least {taken}, the steps that the "
            f"checkpoint has taken, but got {max_steps}: raise it, or give an earlier `ckpt_path`."
        )


def _is_of_tuner(trainer: Trainer) -> bool:
    """Whether Lightning's tuner is restoring the state that it saved itself."""
    name = Path(trainer.ckpt_path or "").name
    return name.startswith((".lr_find", ".scale_batch_size"))


def _of_trainer(trainer: Trainer) -> Settings:
    scheduled = any(
        isinstance(callback, GradientAccumulationScheduler)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    fixed = [name for name in FIXED_IN_TRAINER if not (scheduled and name.startswith("acc"))]
    names = {name: name not in FIXED_IN_TRAINER for name in (*fixed, *CHANGING_IN_TRAINER)}
    found = {f"trainer.{n}": Setting(_plain(getattr(trainer, n)), may) for n, may in names.items()}
    seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning keeps it
    if seed is not None:
        found["seed_everything"] = Setting(int(seed), False)
    return found


def _of_data(data: LightningDataModule) -> Settings:
    ours = any(
        "__init__" in vars(each) and each.__module__.startswith("lightning_sae.")
        for each in type(data).__mro__
    )
    return {
        f"data.{name}": Setting(value, not ours or name in FREE_IN_DATA)
        for name, value in _flat(_kept_arguments(data))
        if name not in SOURCE and not (ours and name in FREE_IN_DATA)
    }


def _of_shares(part: object, prefix: str, total: int) -> Settings:
    """Shares of the run converted to steps, which change with the length of the run."""
    if not isinstance(part, HasLengths) or total <= 0:
        return {}
    given = {name: getattr(part, name) for name in part.length_names}
    lengths = {name: AUTO_DECAY if x == "auto" else x for name, x in given.items()}
    return {
        f"{prefix}{name} in steps": Setting(steps_of(length, total, name), True)
        for name, length in lengths.items()
        if length is not None and is_share(length)
    }


def _of_callbacks(callbacks: Sequence[Callback]) -> Settings:
    acting = [each for each in callbacks if _acts(each)]
    kinds = sorted(type(each).__name__ for each in acting)
    found = {"callbacks": Setting(", ".join(kinds), True)}
    for callback in acting:
        ours = _module(callback).startswith("lightning_sae.")
        found |= {
            f"callbacks.{type(callback).__name__}.{name}": Setting(value, not ours)
            for name, value in _flat(_kept_arguments(callback))
        }
    return found


def _acts(callback: Callback) -> bool:
    """Whether weights may depend on the callback, judged by its class."""
    name, module = type(callback).__name__, _module(callback)
    return name not in WATCHING and name[0] != "_" and not module.startswith("lightning.")


def _module(callback: Callback) -> str:
    return type(callback).__module__


def _kept_arguments(part: object) -> dict[str, Any]:
    """Constructor arguments that an object stores under their own names."""
    inits = [vars(each)["__init__"] for each in type(part).__mro__[:-1] if "__init__" in vars(each)]
    names = {name for init in inits for name in inspect.signature(init).parameters}
    return {name: value for name, value in sorted(vars(part).items()) if name in names}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Plain values by dotted name; others are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in _flat(value))
        elif _is_plain(value):
            yield name, _plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, str | int | float | Path | torch.dtype)


def _plain(value: Any) -> Any:
    """A value of Python's built-in types; lists become tuples, which configuration files lack."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Enum):  # such as Lightning's enums, which are also strings
        return value.value
    if value is None or isinstance(value, bool):
        return value
    kind = next((kind for kind in (int, float) if isinstance(value, kind)), str)
    return kind(value)
