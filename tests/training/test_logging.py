import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_sae import ReLUSAE
from lightning_sae.callbacks import L1Warmup, StepMonitor
from lightning_sae.training.logging import Logged


class Extra(Callback):
    """Logs in several hooks: numbers, tensors, means of an epoch, other values of the same name."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("at/start", trainer.global_step)
        pl_module.log("mean", float(trainer.global_step), on_step=True, on_epoch=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("at/end", torch.tensor(2.0 * trainer.global_step))
        if trainer.global_step % 3 == 0:
            pl_module.log("at/third", torch.tensor(1.0 * trainer.global_step))
        self.seen = {k: float(v) for k, v in trainer.callback_metrics.items()}


def rows(folder: Path, repeated: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], int]:
    """What is written, what callbacks saw last, and how many calls were shortened."""
    shortened = 0
    again = Logged.again

    def counted(*args: Any) -> bool:
        nonlocal shortened
        found = repeated and again(*args)
        shortened += found
        return found

    monkeypatch.setattr(Logged, "again", counted)
    torch.manual_seed(0)
    extra, logger = Extra(), CSVLogger(folder)
    trainer = Trainer(
        max_epochs=3,
        limit_train_batches=7,
        log_every_n_steps=2,
        logger=logger,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[extra, StepMonitor(), L1Warmup(n_steps=10)],
    )
    loader = torch.utils.data.DataLoader(torch.randn(7 * 32, 8), batch_size=32)  # type: ignore[arg-type, var-annotated]
    trainer.fit(ReLUSAE(8, 16), loader, loader)
    monkeypatch.setattr(Logged, "again", again)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    written = list(csv.DictReader(lines))
    timeless = [{k: v for k, v in row.items() if "per_second" not in k} for row in written]
    return [*timeless, extra.seen], shortened


def test_what_is_logged_is_what_whole_calls_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, none = rows(tmp_path / "whole", False, monkeypatch)
    short, many = rows(tmp_path / "short", True, monkeypatch)
    assert short == whole
    assert none == 0
    assert many > 100


def test_a_value_that_is_logged_in_another_way_is_refused_as_by_lightning() -> None:
    class Twice(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            pl_module.log("value", torch.tensor(1.0), prog_bar=trainer.global_step > 2)

    trainer = Trainer(
        max_steps=4,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Twice()],
    )
    loader = torch.utils.data.DataLoader(torch.randn(128, 8), batch_size=8)  # type: ignore[arg-type, var-annotated]
    with pytest.raises(MisconfigurationException, match="twice"):
        trainer.fit(ReLUSAE(8, 16), loader)
