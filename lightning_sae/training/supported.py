"""Features of Lightning that a run refuses before it starts, each with the reason.

`docs/lightning.md` lists all features. Data modules refuse what needs the end of an epoch, see
`lightning_sae.data.loaders`.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.compile import to_uncompiled

HALF = (torch.float16, torch.bfloat16)

REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: (
        "it replaces the schedule of the learning rate, averages at the ends of epochs, and "
        "averaged decoder rows do not have norm 1"
    ),
    WeightAveraging: (
        "averaged decoder rows do not have norm 1, and a prolonged run would continue from the "
        "average"
    ),
    ModelPruning: "it replaces the SAE's parameters by others that are not saved",
}
"""Callbacks of Lightning that are wrong for an SAE, and why."""


def require_supported_features(module: LightningModule, trainer: Trainer, stage: str) -> None:
    """Raise a ValueError if the trainer uses an unsupported feature."""
    _require_not_compiled(module)
    _require_strategy(trainer)
    if stage != "fit":
        return
    _require_precision(module, trainer)
    _require_training_step(module)
    if trainer.gradient_clip_algorithm and trainer.gradient_clip_val is None:
        raise ValueError(
            f"Expected argument `trainer.gradient_clip_val` with `gradient_clip_algorithm="
            f"{trainer.gradient_clip_algorithm}` but got none: give both, or neither, where "
            "`clip_grad_norm` of the SAE clips by the norm."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _require_callback(callback)


def _require_not_compiled(module: LightningModule) -> None:
    if module._compiler_ctx is None:
        return
    to_uncompiled(module)  # as it was before the refusal
    raise ValueError(
        "`torch.compile` cannot make a training step of an SAE faster, for the number of active "
        "latents changes from batch to batch: give the trainer the SAE itself. `sae.compile()` "
        "compiles `forward` alone."
    )


def _require_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, DeepSpeedStrategy)  # which derives from DDP
    if is_sharded or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            "Expected argument `trainer.strategy` to be `auto` or `ddp` but got "
            f"{type(strategy).__name__}: each rank needs the whole dictionary, to select latents "
            "and to keep decoder rows at norm 1. Choose one of these."
        )


def _require_precision(module: LightningModule, trainer: Trainer) -> None:
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if trainer.precision in ("16-true", "bf16-true") or dtypes & set(HALF):
        raise ValueError(
            f"Expected argument `trainer.precision` to keep weights in float32 but got "
            f"{trainer.precision} with weights of {', '.join(sorted(map(str, dtypes)))}: a step of "
            "Adam is smaller than a half-precision weight can show, and float16 overflows. Use "
            "`bf16-mixed`, which multiplies in bfloat16, on an SAE in float32."
        )


def _require_training_step(module: LightningModule) -> None:
    own = type(module).training_step.__module__
    if not module.automatic_optimization and own.startswith("lightning_sae."):
        raise ValueError(
            f"`{type(module).__name__}` sets `automatic_optimization = False` but inherits "
            "`training_step`, which leaves the step to Lightning: give a `training_step` that "
            "steps the optimizer, or leave optimisation automatic."
        )


def _require_callback(callback: Any) -> None:
    for kind, reason in REFUSED.items():
        if isinstance(callback, kind):
            raise ValueError(
                f"`{type(callback).__name__}` is not supported: {reason}. Remove the callback."
            )
    if not isinstance(callback, ModelCheckpoint):
        return
    by_step = callback._every_n_train_steps > 0 or callback._train_time_interval is not None
    if by_step and (callback.monitor or "").startswith("val/"):
        raise ValueError(
            f"`ModelCheckpoint(monitor={callback.monitor!r})` with `every_n_train_steps` or "
            "`train_time_interval` saves before the validation of its step, and would rank by the "
            "one before: leave them out, and it saves after each validation."
        )
