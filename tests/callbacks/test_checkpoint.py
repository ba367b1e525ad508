import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE
from lightning_sae.callbacks import RunCheckpoint


class At(Callback):
    """Does something while the batch of the given index is trained on."""

    def __init__(self, batch_idx: int, action: Any) -> None:
        self.batch_idx, self.action = batch_idx, action

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.batch_idx:
            self.action()


def fit(
    root: Path, *callbacks: Callback, ckpt_path: Path | None = None, **arguments: Any
) -> ReLUSAE:
    torch.manual_seed(0)
    sae = ReLUSAE(4, 6, decoder_norm="free", lr=0.01)
    trainer = Trainer(
        default_root_dir=root,
        callbacks=[RunCheckpoint(every_n_steps=2), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 6, **arguments},
    )
    trainer.fit(sae, data(), ckpt_path=ckpt_path, weights_only=True)
    return sae


def data() -> "DataLoader[Tensor]":
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=16)  # type: ignore[arg-type]


def steps_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


class Saves(Callback):
    """The steps at which `last.ckpt` stood when a batch began."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, []  # type: ignore[var-annotated]

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append(steps_in(self.path) if self.path.exists() else 0)


@pytest.mark.parametrize(
    ("accumulate", "expected"), [(1, [0, 0, 2, 2, 4]), (2, [0] * 4 + [2] * 4 + [4] * 2)]
)
def test_last_checkpoint_counts_optimizer_steps_and_holds_the_end(
    accumulate: int, expected: list[int], tmp_path: Path
) -> None:
    saves = Saves(tmp_path / "checkpoints" / "last.ckpt")
    fit(tmp_path, saves, max_steps=5, accumulate_grad_batches=accumulate)
    assert saves.seen == expected
    assert steps_in(saves.path) == 5
    assert [p.name for p in saves.path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    number: signal.Signals, accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt = At(2, lambda: os.kill(os.getpid(), number))
    caplog.set_level(logging.INFO, "lightning.pytorch")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path / "a", interrupt, accumulate_grad_batches=accumulate)
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert steps_in(path) == 3  # the step under way, the third, was finished
    assert f"Stopped after 3 optimizer steps; the checkpoint is {path}" in caplog.text
    assert f"--ckpt_path {path}" in caplog.text


def test_handlers_of_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_failure_keeps_the_last_checkpoint_and_saves_the_weights_before_it(
    tmp_path: Path,
) -> None:
    def fail() -> None:
        raise RuntimeError("something broke")

    with pytest.raises(RuntimeError, match="something broke"):
        fit(tmp_path, At(3, fail))
    assert steps_in(tmp_path / "checkpoints" / "last.ckpt") == 2
    assert steps_in(tmp_path / "checkpoints" / "stopped.ckpt") == 3


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning")
def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    fit(tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=f"holds a run .* not overwritten: .*--ckpt_path {last}"):
        fit(tmp_path)
    fit(tmp_path, ckpt_path=last, max_steps=8)
    assert steps_in(last) == 8


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning")
def test_the_folder_of_another_run_is_not_resumed_into(tmp_path: Path) -> None:
    fit(tmp_path / "a")
    fit(tmp_path / "b")
    last, other = (tmp_path / name / "checkpoints" / "last.ckpt" for name in "ab")
    before = other.read_bytes()
    with pytest.raises(ValueError, match="holds a run .* not overwritten"):
        fit(tmp_path / "b", ckpt_path=last, max_steps=8)
    assert other.read_bytes() == before


def test_a_second_signal_names_only_what_was_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def twice() -> None:  # sent to the process, two might come as one
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    caplog.set_level(logging.INFO, "lightning.pytorch")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, At(3, twice))
    assert steps_in(tmp_path / "checkpoints" / "stopped.ckpt") == 3
    assert f"the checkpoint is {tmp_path}/checkpoints/stopped.ckpt" in caplog.text


def test_a_failure_before_training_saves_nothing(tmp_path: Path) -> None:
    class Refuses(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fit(tmp_path, Refuses())
    assert not (tmp_path / "checkpoints").exists()


def test_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`every_n_steps` to be positive but got 0"):
        RunCheckpoint(every_n_steps=0)
