"""Runs that are done once on one rank with batch B, and once on two with batch B / 2."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import (
    ActivationDataModule,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.callbacks import (
    AuxThresholdWarmup,
    DeadFeatureResampling,
    DecoderNormProjection,
    L1Warmup,
    OrthogonalTo,
    TargetL0,
)
from lightning_sae.functional.penalties import Sqrt

CACHED: Any = {"tokens": 600, "held_out": 128, "shard_bytes": 50_000}
D_IN, D_SAE, BATCH, STEPS = 8, 24, 32, 8
DEAD = [3, 10, 11, 17]
QUIET: dict[str, Any] = {
    **dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    ),
    "accelerator": "cpu",
    "use_distributed_sampler": False,
}
"""Arguments of every trainer."""


@dataclass(frozen=True)
class Case:
    """An architecture with its callbacks, made anew for each run."""

    kind: Callable[..., Any]
    arguments: dict[str, Any]
    callbacks: Callable[[], list[Callback]] = list
    flags: dict[str, Any] = field(default_factory=dict)


class Calibrates(Callback):
    """Sets the threshold by the last batch, whose halves differ much."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            pl_module.calibrate(batch)


def orthogonal_to() -> OrthogonalTo:
    return OrthogonalTo(torch.ones(D_IN))


def warmed() -> list[Callback]:
    return [L1Warmup(4)]


def resampled() -> list[Callback]:
    return [DeadFeatureResampling(3, n_inputs=80)]


def reinitialized() -> list[Callback]:
    return [DeadFeatureResampling(3, "reinitialize", min_frequency=0.1)]


AUX = {"orthogonality_coefficient": 50.0, "orthogonality_window": 3}

CASES = {
    "relu": Case(ReLUSAE, {"l1_coefficient": 0.5}, lambda: [*warmed(), *resampled()]),
    "relu-accumulated": Case(
        ReLUSAE, {"l1_coefficient": 0.5}, resampled, {"accumulate_grad_batches": 2, "max_steps": 4}
    ),
    "relu-chunks": Case(ReLUSAE, {"l1_coefficient": 0.5, "chunk_rows": 7}, warmed),
    "relu-target": Case(
        ReLUSAE,
        {"l1_coefficient": 0.5},
        lambda: [TargetL0(3.0, max_change=0.1, smoothing_steps=2, foresight_steps=0)],
    ),
    "relu-orthogonal": Case(ReLUSAE, {"l1_coefficient": 0.5}, lambda: [orthogonal_to()]),
    "relu-free-ghost": Case(
        ReLUSAE, {"l1_coefficient": 0.5, "decoder_norm": "free", "revive": "ghost"}
    ),
    "sqrt": Case(ReLUSAE, {"l1_coefficient": 0.5, "penalty": Sqrt(epsilon=0.01)}, reinitialized),
    "tied": Case(
        TiedSAE, {"l1_coefficient": 0.3, **AUX}, lambda: [AuxThresholdWarmup(2, 3), *resampled()]
    ),
    "tied-high-mixture": Case(
        TiedSAE,
        {
            "l1_coefficient": 0.3,
            **AUX,
            "orthogonality_side": "high",
            "orthogonality_threshold": "mixture",
        },
        lambda: [AuxThresholdWarmup(2, 3)],
    ),
    "tied-jump": Case(TiedSAE, {"l1_coefficient": 0.3, "threshold_init": 0.1, "bandwidth": 0.5}),
    "gated": Case(GatedSAE, {"l1_coefficient": 0.3, "revive": "auxk"}, warmed),
    "jumprelu": Case(
        JumpReLUSAE, {"l0_coefficient": 0.3, "bandwidth": 0.5, "threshold_lr": 0.01}, resampled
    ),
    "jumprelu-target": Case(
        JumpReLUSAE,
        {"target_l0": 3.0, "bandwidth": 0.5, "dead_coefficient": 0.1, "revive": "ghost"},
        warmed,
    ),
    "topk": Case(TopKSAE, {"k": 3, "k_aux": 2}),
    "topk-ghost": Case(TopKSAE, {"k": 3, "revive": "ghost"}, resampled),
    "batch-topk": Case(BatchTopKSAE, {"k": 2.6, "k_aux": 2}, resampled),
    "batch-topk-calibrated": Case(BatchTopKSAE, {"k": 2.6}, lambda: [Calibrates()]),
    "batch-topk-chunks": Case(BatchTopKSAE, {"k": 2.6, "chunk_rows": 5, **AUX}),
    "batch-topk-many": Case(BatchTopKSAE, {"k": 20, "chunk_rows": 5}),
    "matryoshka": Case(MatryoshkaSAE, {"k": 3, "prefixes": (4, 12, D_SAE)}),
    "matryoshka-drawn": Case(MatryoshkaSAE, {"k": 3, "prefixes": 3, **AUX}),
    "matryoshka-relu": Case(
        MatryoshkaSAE, {"k": None, "prefixes": 3, "l1_coefficient": 0.3, "revive": "auxk"}, warmed
    ),
}


def activations() -> Tensor:
    """Batches whose second half is larger than the first: ranks that see one each must talk."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, BATCH, D_IN, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64).view(-1, 1) + 0.3


class Logged(Callback):
    """What was logged at each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({name: value.clone() for name, value in trainer.callback_metrics.items()})


def build(case: Case) -> Any:
    """The SAE before training, with some latents that are dead already."""
    torch.manual_seed(0)
    arguments = {"lr": 0.02, "dead_after": 3 * BATCH, "clip_grad_norm": 5.0, **case.arguments}
    sae = case.kind(D_IN, D_SAE, **arguments)
    sae.layout.dense, sae.layout.thresholds = True, (2.0, 2.0)  # the first batch, and no other
    sae.silent_for[DEAD] = sae.dead_after
    with torch.no_grad():
        if not isinstance(sae, TiedSAE):
            sae.b_enc[DEAD] = -50.0
    return sae


def train(case: Case, batches: Tensor, **flags: Any) -> dict[str, Any]:
    """Weights and buffers after training, moments, and what was logged."""
    sae, logged = build(case), Logged()
    free = case.arguments.get("decoder_norm") == "free"
    callbacks = [*case.callbacks(), *([] if free else [DecoderNormProjection()]), logged]
    settings = {
        **QUIET,
        "max_steps": STEPS,
        "precision": "64-true",
        **case.flags,
        **flags,
    }
    trainer = Trainer(callbacks=callbacks, **settings)
    trainer.fit(sae, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    # As a checkpoint has them, whole where a dictionary is split.
    moments: Any = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
    result = {
        "state": trainer.strategy.lightning_module_state_dict(),
        "moments": {f"{i}.{name}": v for i, m in moments.items() for name, v in m.items()},
        "logged": logged.rows,
        "penalty_factor": sae.penalty_factor,
    }
    return copy.deepcopy(result)


def to_cache(folder: Path) -> ActivationDataModule:
    """What is cached by one rank or two."""
    return ActivationDataModule(
        "blocks.0.hook_resid_post",
        text=folder / "text.txt",
        validation_fraction=0.3,
        context_length=16,
        blocks_per_pass=4,
    )


def to_analyze(folder: Path) -> Path:
    """The folder of an SAE, made if absent; of its latents, some never fire."""
    if not (folder / "sae").exists():
        torch.manual_seed(0)
        sae = ReLUSAE(128, 24)
        with torch.no_grad():
            sae.b_enc[:4] = -1e6
            sae.b_enc[4:].uniform_(-3, 0)
        sae.source = {
            "model": "embedded",
            "hook_name": "blocks.0.hook_resid_post",
            "text": "embedded",
            "context_length": 32,
            "drop_special_tokens": True,
        }
        sae.save_pretrained(folder / "sae")
    return folder / "sae"
