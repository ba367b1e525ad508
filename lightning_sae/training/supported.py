"""Features of Lightning that a run refuses, most of them before it starts, each with the reason.

`docs/lightning.md` lists all features. Data modules refuse what needs the end of an epoch, see
`lightning_sae.data.loaders`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import nn
from torch.optim import LBFGS

from lightning_sae.distributed.split import HasLatents, parts_of

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
    BackboneFinetuning: (
        "an SAE has no attribute `backbone`. To freeze weights, set `requires_grad` of a parameter "
        "to False, or use a `BaseFinetuning` of your own"
    ),
}
"""Callbacks of Lightning that are wrong for an SAE, and why."""


def require_supported_features(module: LightningModule, trainer: Trainer, stage: str) -> None:
    """Raise a ValueError if the trainer uses an unsupported feature."""
    _require_not_compiled(module)
    _require_own_parameters(module)
    _require_strategy(trainer)
    if parts_of(trainer).n > 1:
        _require_splittable(module, trainer, parts_of(trainer).n, stage)
    if stage != "fit":
        return
    _require_precision(module, trainer)
    _require_training_step(module)
    _require_trainable(module)
    if trainer.gradient_clip_algorithm and trainer.gradient_clip_val is None:
        raise ValueError(
            f"Expected argument `trainer.gradient_clip_val` with `gradient_clip_algorithm="
            f"{trainer.gradient_clip_algorithm}` but got none: give both, or neither, where "
            "`clip_grad_norm` of the SAE clips by the norm."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    require_supported_callbacks(callbacks)
    for callback in callbacks:
        _require_right_ranking(callback)


def _require_not_compiled(module: LightningModule) -> None:
    if module._compiler_ctx is None:
        return
    to_uncompiled(module)  # as it was before the refusal
    raise ValueError(
        "`torch.compile` cannot make a training step of an SAE faster, for the number of active "
        "latents changes from batch to batch: give the trainer the SAE itself. `sae.compile()` "
        "compiles `forward` alone."
    )


def _require_own_parameters(module: LightningModule) -> None:
    """Raise a ValueError if weights are computed from parameters that are not the SAE's own."""
    for name, _ in module.named_parameters():
        if name.endswith("_orig") or "parametrizations." in name:
            raise ValueError(
                f"Expected the SAE's own parameters but got `{name}`, from which a weight is "
                "computed: it would not be saved. Remove `torch.nn.utils.prune` (`prune.remove`) "
                "or `torch.nn.utils.parametrize` (`remove_parametrizations`)."
            )


def _require_trainable(module: LightningModule) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            "Expected parameters to train but `requires_grad` of all of them is False: call "
            "`sae.unfreeze()`, or remove the callback that freezes them."
        )


def require_usable_optimizers(trainer: Trainer) -> None:
    """Raise a ValueError for an optimizer that cannot train an SAE."""
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            "`LBFGS` is not supported: it needs the same batch in several evaluations, and weights "
            "in memory order, where `W_enc` is stored transposed. Use another optimizer."
        )


def _require_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, DeepSpeedStrategy)  # which derives from DDP
    if is_sharded or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            "Expected argument `trainer.strategy` to be `auto`, `ddp` or `SplitDictionary` but got "
            f"{type(strategy).__name__}: latents are selected among all, and decoder rows kept at "
            "norm 1, for which weights must not be cut up otherwise. Choose one of these."
        )


def _require_splittable(module: Any, trainer: Trainer, n_parts: int, stage: str) -> None:
    """Refuse what a dictionary in several parts does not support, each with the reason."""
    if not isinstance(module, HasLatents):
        raise ValueError(
            f"Expected one SAE with `trainer.strategy=SplitDictionary` but got a "
            f"`{type(module).__name__}`: train each large dictionary in a run of its own."
        )
    if not module.may_be_split:
        raise ValueError(
            f"`{type(module).__name__}` has an `activate`, `latents` or `objective` of its own, "
            "which may need latents that are on other devices: exchange what is needed through "
            "`self.parts`, and set `may_be_split = True` in the class, or choose another strategy."
        )
    axes, d_sae, weights = module.latent_axes(), module.d_sae, cast(nn.Module, module)
    if d_sae % n_parts:
        raise ValueError(
            f"Expected argument `d_sae` to be a multiple of the {n_parts} parts of the dictionary "
            f"but got {d_sae}: choose {d_sae + -d_sae % n_parts}, or other `parts`."
        )
    tensors = [*weights.named_buffers(), *weights.named_parameters()]
    tables = sorted({name for name, tensor in tensors if tensor.dim() > 1} - axes.keys())
    if tables:
        raise ValueError(
            "A dictionary in several parts does not support the auxiliary loss of orthogonality, "
            f"nor other tables ({', '.join(tables)}), which would be whole on each device: set "
            "`orthogonality_coefficient` to 0, or use `ddp`."
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            "Expected argument `trainer.precision` not to be `16-mixed` for a dictionary in parts, "
            "where gradients may overflow on one device alone, which alone would skip its step: "
            "use `bf16-mixed`."
        )
    if stage == "predict":
        raise ValueError(
            "A dictionary in several parts does not support `predict`, where each would hold "
            "all latents: use the exported SAE on one device or with `ddp`."
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


def require_supported_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise a ValueError if one of the callbacks is wrong for an SAE."""
    for callback in callbacks:
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise ValueError(
                    f"`{type(callback).__name__}` is not supported: {reason}. Remove the callback."
                )


def _require_right_ranking(callback: Any) -> None:
    if not isinstance(callback, ModelCheckpoint):
        return
    by_step = callback._every_n_train_steps > 0 or callback._train_time_interval is not None
    if by_step and (callback.monitor or "").startswith("val/"):
        raise ValueError(
            f"`ModelCheckpoint(monitor={callback.monitor!r})` with `every_n_train_steps` or "
            "`train_time_interval` saves before the validation of its step, and would rank by the "
            "one before: leave them out, and it saves after each validation."
        )


def require_one_loader(dataloader_idx: int) -> None:
    """Raise a ValueError if there are several held-out loaders, whose metrics would be mixed."""
    if dataloader_idx:
        raise ValueError(
            "Expected one loader of held-out activations but got several, and metrics are those of "
            "one: call `trainer.validate` or `trainer.test` once for each."
        )


def require_a_batch(n_batches: float) -> None:
    """Raise a ValueError if there is no batch to train on."""
    if n_batches == 0:
        raise ValueError(
            "The training data gave no batch, so nothing was trained: give more activations, or "
            "smaller batches without `drop_last`."
        )
