"""What a run's folder holds, who may write there, and what a stopped run makes up for."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import lightning_sae
from lightning_sae import ReLUSAE, ToyDataModule
from lightning_sae.callbacks import ExportSAE, HeldOutEvaluation, RunCheckpoint
from lightning_sae.callbacks.run_folder import hold, release

LOCKS = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the run's folder."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", LOCKS, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def fit(root: Path, *callbacks: Callback, ckpt_path: Path | None = None, **flags: Any) -> Trainer:
    torch.manual_seed(0)
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=root,
        callbacks=[*callbacks, ExportSAE(), RunCheckpoint(2)],
        **{**settings, **dict.fromkeys(silent, False), **flags},
    )
    data = ToyDataModule(6, 8, batch_size=16, n_validation=32)
    trainer.fit(ReLUSAE(8, 16, lr=0.01), datamodule=data, ckpt_path=ckpt_path)
    return trainer


def test_a_folder_with_a_run_under_way_is_refused_until_that_is_killed(
    tmp_path: Path, other: Any
) -> None:
    root = tmp_path / "run"
    with pytest.raises(ValueError, match="another run is in progress in"):
        fit(root)
    assert [path.name for path in root.iterdir()] == [".lock"]
    other.kill()
    other.wait()
    fit(root)
    assert sorted(path.name for path in root.iterdir()) == ["checkpoints", "sae"]


def test_a_folder_that_is_asked_for_twice_is_given_up_with_the_second(tmp_path: Path) -> None:
    root = tmp_path / "new"
    hold(root)
    hold(root)
    release(root)
    assert (root / ".lock").exists()
    release(root)
    assert not root.exists()
    tmp_path.joinpath("mine").mkdir()
    hold(tmp_path / "mine")
    release(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_what_killed_writes_left_is_removed_and_does_not_count_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".last.ckpt.abcd1234").write_bytes(b"half")
    (tmp_path / "run" / ".sae.abcd1234").mkdir()
    fit(tmp_path / "run")
    names = [path.name for path in (tmp_path / "run").rglob("*") if path.name[0] == "."]
    assert not names


def test_results_of_killed_writes_are_removed_and_others_kept(tmp_path: Path) -> None:
    trainer = fit(tmp_path / "run", HeldOutEvaluation(), limit_test_batches=1)
    left = [tmp_path / "run" / name for name in (".results.json.ab12", ".results-2.json.cd34")]
    other = tmp_path / "run" / ".notes"
    for path in (*left, other):
        path.write_text("{")
    trainer.test(trainer.model, datamodule=trainer.datamodule, verbose=False)  # type: ignore
    assert not any(path.exists() for path in left)
    assert other.exists()
    assert "mse" in json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize("left", [[], ["sae.safetensors"], ["config.json", ".sae.safetensors.x"]])
def test_an_export_that_is_missing_or_half_is_made_up_for(left: list[str], tmp_path: Path) -> None:
    fit(tmp_path / "run")
    folder, last = tmp_path / "run" / "sae", tmp_path / "run" / "checkpoints" / "last.ckpt"
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    for name in left:
        (folder / name).write_bytes(expected.get(name, b""))
    if not left:
        folder.rmdir()
    fit(tmp_path / "run", ckpt_path=last)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    fit(tmp_path / "run", ckpt_path=last)  # nothing is missing now
    assert not (tmp_path / "run" / "sae-2").exists()


def test_an_export_of_other_weights_gets_the_next_name(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "run", ckpt_path=last, max_steps=6)
    (tmp_path / "run" / "sae-2" / "config.json").unlink()
    (tmp_path / "run" / "sae-2" / "notes.txt").write_text("mine")  # so this is not half an export
    fit(tmp_path / "run", ckpt_path=last, max_steps=6)
    loaded = [lightning_sae.load(tmp_path / "run" / name) for name in ("sae", "sae-3")]
    assert not torch.equal(loaded[0].W_enc, loaded[1].W_enc)
    assert (tmp_path / "run" / "sae-2" / "notes.txt").exists()


class Validations(Callback):
    """Notes the steps that were validated; fails at the start of one, if asked to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.steps = fails_at, []  # type: ignore[var-annotated]

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.fails_at:
            raise RuntimeError("stopped")
        self.steps.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))


@pytest.mark.parametrize("at", [4, 8])
def test_a_validation_that_was_due_at_the_checkpoint_is_done_on_resume(
    at: int, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    flags |= {"max_steps": 8, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    whole, first, second = Validations(), Validations(at), Validations()
    fit(tmp_path / "whole", whole, **flags)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "parts", first, **flags)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "parts", second, ckpt_path=last, **flags)
    assert [step for step, _ in whole.steps] == [2, 4, 6, 8]
    repeated = [entry for entry in second.steps if entry not in first.steps]
    assert first.steps + repeated == whole.steps


def test_a_hook_of_the_sae_that_comes_after_the_checkpoint_is_warned_of(tmp_path: Path) -> None:
    class Late(ReLUSAE):
        def on_train_batch_end(self, *_: Any) -> None:
            """Something."""

    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {"limit_val_batches": 0, **dict.fromkeys(silent, False)}
    trainer = Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path / "run",
        callbacks=RunCheckpoint(), **settings,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="`Late.on_train_batch_end` comes after the checkpoint"):
        trainer.fit(Late(8, 16), datamodule=ToyDataModule(6, 8, batch_size=16))
