"""Train the SAEs of a study together, on one pass of the language model."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.callbacks import RunCheckpoint, SAEProgressBar
from lightning_sae.checkpoints import AtomicCheckpointIO
from lightning_sae.data import ActivationDataModule
from lightning_sae.loading import load
from lightning_sae.side_by_side import SideBySide
from lightning_sae.studies.shared.folder import write_json
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.toy_training import quiet

SAVE_EVERY = 250


def train_together(
    setting: Setting,
    folder: Path,
    members: Sequence[dict[str, Any]],
    *,
    seed: int,
    steps: int | None = None,
    data: ActivationDataModule | None = None,
    watching: Sequence[Callback] = (),
) -> dict[str, SparseAutoencoder]:
    """Train SAEs side by side; resume where an earlier run stopped.

    When all are trained they are exported to `<folder>/saes/<name>`; SAEs that were exported before
    are only read. Curves for TensorBoard are in `<folder>/tensorboard`.

    Args:
        setting: The study's setting.
        folder: The folder of this training.
        members: Descriptions as for `SideBySide`, without `d_in`.
        seed: Seed of the initial weights and of the order of the text.
        steps: Optimizer steps; those of the setting by default.
        data: The stream; by default that of the setting, with this seed.
        watching: Callbacks for the whole run.

    Returns:
        The SAEs by name, which act on raw activations; those whose loss became non-finite are left
        out.
    """
    done, saes = folder / "trained.json", folder / "saes"
    if not done.is_file():
        data = data or setting.data(seed)
        torch.manual_seed(seed)
        with quiet():
            model = SideBySide(list(members), d_in=data.d_in)
            _fit(setting, folder, model, data, steps or setting.steps, watching)
        _export(model, saes)
        names = [member.name for member in model.active]
        write_json(done, {"trained": names, "stopped": model.stopped})
        shutil.rmtree(folder / "checkpoints")  # needed only to resume
    return {path.name: load(path) for path in sorted(saes.iterdir())}


def _fit(
    setting: Setting,
    folder: Path,
    model: SideBySide,
    data: ActivationDataModule,
    steps: int,
    watching: Sequence[Callback],
) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    trainer = Trainer(
        default_root_dir=folder,
        accelerator=setting.device,
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        enable_model_summary=False,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        plugins=[AtomicCheckpointIO()],
        callbacks=[*watching, RunCheckpoint(SAVE_EVERY), SAEProgressBar()],
    )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=last if last.is_file() else None)
    except SystemExit:  # Lightning raises it on Ctrl-C, after the checkpoint is written
        sys.stderr.write("\nStopped. Run the same command again to resume.\n")
        raise


def _export(model: SideBySide, folder: Path) -> None:
    """Export all SAEs, or none if this is interrupted."""
    part = folder.with_suffix(".part")
    for left_over in (part, folder):
        shutil.rmtree(left_over, ignore_errors=True)
    for member in model.active:
        member.sae.save_pretrained(part / member.name)
    part.rename(folder)
