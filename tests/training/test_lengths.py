"""Lengths as shares of the run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_sae import SideBySide, TiedSAE, ToyDataModule
from lightning_sae.callbacks import (
    AuxThresholdWarmup,
    DeadFeatureResampling,
    L1Warmup,
    RunCheckpoint,
)
from lightning_sae.training.lengths import two_steps_of

QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary"), False
)


def fit(
    root: Path, module: Any, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any
) -> Any:
    flags = {**QUIET, "max_steps": 12, "limit_val_batches": 0, "accelerator": "cpu", **settings}
    trainer = Trainer(default_root_dir=root, callbacks=[*callbacks, RunCheckpoint(4)], **flags)
    trainer.fit(module, datamodule=ToyDataModule(6, 8, batch_size=16), ckpt_path=ckpt_path)
    return module


def sae(**arguments: Any) -> TiedSAE:
    torch.manual_seed(0)
    arguments = {"orthogonality_coefficient": 3.0, "lr": 0.01, **arguments}
    return TiedSAE(8, 16, 0.5, **arguments)


def parts(as_shares: bool) -> tuple[TiedSAE, list[Callback]]:
    """An SAE and callbacks with all lengths there are, for a run of 12 steps."""

    def length(steps: int) -> int | float:
        return steps / 12 if as_shares else steps

    module = sae(lr_warmup_steps=length(3), lr_decay_steps=length(6))
    resampling = DeadFeatureResampling(
        length(4), "reinitialize", window=length(2), min_frequency=0.5, stop_after_step=length(8)
    )
    warm_ups = L1Warmup(length(5)), AuxThresholdWarmup(length(2), length(4))
    return module, [*warm_ups, resampling]


def test_shares_train_what_the_same_numbers_of_steps_train(tmp_path: Path) -> None:
    found = []
    for as_shares in (False, True):
        module, callbacks = parts(as_shares)
        found.append(fit(tmp_path / str(as_shares), module, *callbacks).W_dec)
    plain = fit(tmp_path / "plain", sae()).W_dec
    assert torch.equal(*found)
    assert not torch.equal(plain, found[0])


def test_two_shares_of_no_more_than_a_run_fit_into_every_run() -> None:
    for total in range(1, 60):
        for hundredths in (1, 8, 25, 33, 50, 75, 99):
            first, second = hundredths / 100, 1 - hundredths / 100
            one, other = two_steps_of(first, second, total, ("a", "b"))
            assert one >= 1
            assert one + other <= total
            assert abs(other - second * total) <= 1


def test_all_lengths_that_do_not_fit_are_named_at_once(tmp_path: Path) -> None:
    module = sae(lr_warmup_steps=10, lr_decay_steps=10)
    callbacks = L1Warmup(20), AuxThresholdWarmup(10, 0.5), DeadFeatureResampling(30, window=0.9)
    with pytest.raises(ValueError, match="lr_warmup_steps") as refusal:
        fit(tmp_path, module, *callbacks)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("lr_decay", "`n_steps`", "delay", "every_n"), strict=True):
        assert name in line
        assert "`trainer.max_steps`=12" in line
    member = {"name": "a", "sae": module, "callbacks": list(callbacks)}
    with pytest.raises(ValueError, match=r"(?s)lr_decay.*`n_steps`.*delay.*every_n"):
        fit(tmp_path, SideBySide([member]))


def test_a_share_needs_a_run_of_known_length(tmp_path: Path) -> None:
    module, callbacks = parts(as_shares=True)
    trainer = Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, **QUIET)
    batches: Any = DataLoader(torch.randn(64, 8), batch_size=16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"set `trainer.max_steps`, or give a number") as refusal:
        trainer.fit(module, batches)
    named = [line.split("`")[1] for line in str(refusal.value).splitlines()]
    ours = ["lr_warmup_steps", "lr_decay_steps", "n_steps", "delay_steps", "warmup_steps"]
    assert named == [*ours, "every_n_steps", "window", "stop_after_step"]
    with pytest.raises(ValueError, match="`n_steps`=0.5 is a share"):
        L1Warmup(0.5).share(3)


@pytest.mark.parametrize("decay", [0.25, "auto"])
def test_a_prolonged_run_has_other_lengths_and_says_so(
    decay: float | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"lr_warmup_steps": 1 / 12, "lr_decay_steps": decay}
    callbacks = L1Warmup(0.5), DeadFeatureResampling(0.5)
    fit(tmp_path, sae(**arguments), *callbacks, max_steps=12)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, sae(**arguments), *callbacks, max_steps=12, ckpt_path=last)
    assert "These settings" not in caplog.text
    fit(tmp_path, sae(**arguments), *callbacks, max_steps=24, ckpt_path=last)
    assert "  trainer.max_steps: 24 (was 12)" in caplog.text
    assert "  model.lr_decay_steps in steps: 6 (was 3)" in caplog.text
    assert "  callbacks.L1Warmup.n_steps in steps: 12 (was 6)" in caplog.text
    assert "  callbacks.DeadFeatureResampling.window in steps: 12 (was 6)" in caplog.text


def test_every_configuration_that_comes_along_gives_its_lengths_as_shares(repository: Path) -> None:
    def lengths(part: Any) -> list[Any]:
        if isinstance(part, dict):
            own = [v for k, v in part.items() if k in ("lr_warmup_steps", "lr_decay_steps")]
            own += [part["n_steps"]] if "n_steps" in part else []
            return own + [each for value in part.values() for each in lengths(value)]
        return [each for value in part for each in lengths(value)] if type(part) is list else []

    found = {
        path.stem: lengths(yaml.safe_load(path.read_text()))
        for path in (repository / "configs").rglob("*.yaml")
    }
    assert sum(map(len, found.values())) > 30
    assert {stem for stem, given in found.items() if not all(0 <= v < 1 for v in given)} == set()
    assert [round(share * 1200) for share in found["quickstart"]] == [200, 100, 300]
