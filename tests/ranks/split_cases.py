"""Runs of a dictionary in several parts; see `split_worker`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import distributed
from torch.utils.data import DataLoader

from lightning_sae import (
    ActivationDataModule,
    GatedSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    RescaledSAE,
    SplitDictionary,
    TiedSAE,
    TopKSAE,
    ToyDataModule,
)
from lightning_sae.callbacks import (
    DeadFeatureResampling,
    LatentFigures,
    RunCheckpoint,
    TopContexts,
)
from tests.ranks.cases import CASES, D_IN, D_SAE, Case, activations, reinitialized, resampled


def rescaled(d_in: int, d_sae: int, **arguments: Any) -> RescaledSAE:
    """Of an SAE that fires."""
    return RescaledSAE.of(ReLUSAE(d_in, d_sae), **arguments)


SILENT: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)

SPLIT: dict[str, Case] = {
    **{
        name: CASES[name]
        for name in (
            *("relu", "relu-accumulated", "relu-chunks", "relu-target", "relu-free-ghost"),
            *("tied-jump", "gated", "jumprelu", "jumprelu-target"),
            *("topk", "batch-topk", "batch-topk-calibrated", "matryoshka-relu"),
        )
    },
    "tied": Case(TiedSAE, {"l1_coefficient": 0.3}, resampled),
    "rescale-and-shift": Case(RescaleAndShiftSAE, {"l1_coefficient": 0.3}),
    "rescaled": Case(rescaled, {"method": "encoder", "decoder_norm": "unit"}),
    "matryoshka-drawn": Case(MatryoshkaSAE, {"k": 3, "prefixes": 3}, reinitialized),
}
"""Runs that are also done with a dictionary in two parts."""

IN_GRID = ("relu", "jumprelu-target", "batch-topk")
"""Those that are done with two copies in two parts each."""

IN_FOUR = ("gated", "topk", "matryoshka")
"""Those that are done in four parts."""


# Runs of a split dictionary on a stream, stopped and continued.


STREAMED: dict[str, Callable[..., Any]] = {
    "toy": partial(TopKSAE, k=3),
    "dealt": partial(MatryoshkaSAE, k=3, prefixes=(6, 12, 24)),
}
"""By the name of the folder: latents in the order of the parts, and dealt to them in turn."""


def toy_run(folder: Path, steps: int, parts: int | None = None, **flags: Any) -> dict[str, Any]:
    """Weights after some steps of a run that begins, or goes on, in a folder; with parts, split."""
    torch.manual_seed(1)
    sae = STREAMED[folder.parent.name](12, 24, lr=0.01, dead_after=60)
    data = ToyDataModule(
        16, 12, directions="random", batch_size=32, seed=3, center=True, scale=True, n_validation=64
    )
    settings = {
        **SILENT,
        "enable_checkpointing": True,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "max_steps": steps,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        **({} if parts is None else {"strategy": SplitDictionary(parts)}),
        **flags,
    }
    resampling = DeadFeatureResampling(3, "reinitialize", min_frequency=0.1)
    trainer = Trainer(callbacks=[RunCheckpoint(), resampling], **settings)
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(sae, data, ckpt_path=last if last.exists() else None)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    state = trainer.strategy.lightning_module_state_dict()
    return {"trainer": trainer, "sae": sae, "state": state, "metrics": metrics}


def ends_with(parts: int, *callbacks: Callback) -> None:
    """A run of a split dictionary that may end with an error."""
    sae = ReLUSAE(D_IN, D_SAE, decoder_norm="free")
    trainer = Trainer(
        accelerator="cpu",
        strategy=SplitDictionary(parts),
        devices=2,
        max_steps=2,
        callbacks=list(callbacks),
        **SILENT,
    )
    trainer.fit(sae, DataLoader(activations().float(), batch_size=None))  # type: ignore[arg-type]


def refused(run: Callable[[], None]) -> str:
    """The message of the error that a run ends with."""
    try:
        run()
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return "nothing"


class Spoils(Callback):
    """Spoils a weight of one rank after the last step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, trainer.max_steps):
            pl_module.W_enc.data[0, 0] = torch.nan


# What one sees of a split dictionary.


def watched(folder: Path, parts: int | None = None) -> None:
    """A short run that logs contexts and figures to TensorBoard, optionally with a split SAE."""
    torch.manual_seed(2)
    sae = TopKSAE(128, 48, k=4, lr=0.01)
    data = ActivationDataModule(
        "blocks.1.hook_resid_post",
        text=folder.parent / "text.txt",
        validation_fraction=0.3,
        context_length=16,
        blocks_per_pass=2,
        batch_size=32,
        buffer_size=128,
        n_validation=256,
    )
    settings = {**SILENT, "logger": TensorBoardLogger(folder, "tb", ""), "accelerator": "cpu"}
    split: dict[str, Any] = (
        {} if parts is None else {"strategy": SplitDictionary(parts), "devices": parts}
    )
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=6,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[LatentFigures(), TopContexts(300, n_latents=12, n_rows=20)],
        **settings,
        **split,
    )
    trainer.fit(sae, datamodule=data)


# What a split dictionary sends.

SENT = {
    "relu": Case(ReLUSAE, {"clip_grad_norm": None}),
    "topk": Case(TopKSAE, {"k": 5}),
    "topk-dead": Case(TopKSAE, {"k": 5, "k_aux": 4, "dead_after": 1}),
    "gated": Case(GatedSAE, {"clip_grad_norm": None}),
    "matryoshka": Case(MatryoshkaSAE, {"k": 5, "prefixes": (64, 128, 256)}),
}
SENT_WIDTH, SENT_LATENTS, SENT_ROWS = 64, 256, 128


class Counts(Callback):
    """Bytes that this rank hands over in each step, by collective."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self._kept = {name: getattr(distributed, name) for name in COLLECTIVES}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        own: dict[str, int] = dict.fromkeys(COLLECTIVES, 0)
        self.steps.append(own)
        for name in COLLECTIVES:
            setattr(distributed, name, partial(self._count, name, own))

    def _count(self, name: str, own: dict[str, int], *given: Any, **more: Any) -> Any:
        tensor = given[1] if name == "all_gather" else given[0]
        own[name] += tensor.numel() * tensor.element_size()
        return self._kept[name](*given, **more)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for name, function in self._kept.items():
            setattr(distributed, name, function)


COLLECTIVES = ("all_reduce", "all_gather")


def sent_by(case: Case) -> list[dict[str, int]]:
    """What a rank of two sends in each of three steps, the batch itself apart."""
    counts = Counts()
    sae = case.kind(SENT_WIDTH, SENT_LATENTS, **case.arguments)
    trainer = Trainer(
        accelerator="cpu",
        strategy=SplitDictionary(),
        devices=2,
        max_steps=3,
        callbacks=[counts],
        **SILENT,
    )
    batches = torch.randn(3, SENT_ROWS, SENT_WIDTH, generator=torch.Generator().manual_seed(0))
    trainer.fit(sae, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return counts.steps
