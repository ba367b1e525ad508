"""A run side by side that is stopped and goes on is the one that was not stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_sae import ReLUSAE, SideBySide, TopKSAE, ToyDataModule
from lightning_sae.callbacks import (
    DeadFeatureResampling,
    DecoderNormProjection,
    L1Warmup,
    RunCheckpoint,
    TargetL0,
)

# Runs of a few steps.
pytestmark = pytest.mark.filterwarnings("ignore:.TargetL0. did not reach its target:UserWarning")


class Shrinks(Callback):
    """A user's own: shrinks the encoder at the end of a step by what it has counted and drawn."""

    steps = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.steps += 1
        with torch.no_grad():
            pl_module.W_enc.mul_(1 - 1e-3 * self.steps * torch.rand(()))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class Stops(Callback):
    """Fails when so many steps are taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def members() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    often = DeadFeatureResampling(4, "reinitialize", window=3, min_frequency=0.1)
    callbacks: dict[str, list[Callback]] = {
        "steered": [L1Warmup(6), TargetL0(3.0)],
        "resampled": [often],
        "own": [Shrinks()],
    }
    saes = {name: ReLUSAE(12, 24, lr=0.01, l1_coefficient=0.1) for name in callbacks}
    found = [
        {"name": name, "sae": saes[name], "callbacks": [DecoderNormProjection(), *own]}
        for name, own in callbacks.items()
    ]
    return [*found, {"name": "topk", "sae": TopKSAE(12, 24, k=3, lr_decay_steps=0)}]


def fit(root: Path, *callbacks: Callback, ckpt_path: Path | None = None, **flags: Any) -> Any:
    model = SideBySide(members())
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {"max_steps": 16, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=root,
        callbacks=[*callbacks, RunCheckpoint(every_n_steps=4)],
        **{**settings, **dict.fromkeys(silent, False), **flags},
    )
    data = ToyDataModule(10, 12, batch_size=16, n_validation=32)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def assert_same_weights(one: Any, other: Any) -> None:
    weights = other.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in one.state_dict().items())


@pytest.mark.parametrize(
    "flags", [{}, {"accumulate_grad_batches": 2}, {"precision": "64-true"}], ids=str
)
def test_what_members_do_at_the_end_of_a_step_is_in_its_checkpoint(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", **flags)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "parts", Stops(10), **flags)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 8
    assert_same_weights(fit(tmp_path / "parts", ckpt_path=last, **flags), whole)


def test_a_run_that_is_prolonged_from_a_checkpoint_of_its_last_step_is_the_longer_one(
    tmp_path: Path,
) -> None:
    """Without a decay, and except for a resampling, which is left out at the end of a run."""
    whole = fit(tmp_path / "whole", max_steps=14)
    fit(tmp_path / "parts", max_steps=8)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    longer = fit(tmp_path / "parts", max_steps=14, ckpt_path=last)
    for name in ("steered", "own", "topk"):
        assert_same_weights(longer[name], whole[name])


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_model_checkpoint_of_the_run_holds_it_too(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "own", every_n_train_steps=6, save_top_k=-1)
    whole = fit(tmp_path / "whole", saver)
    (first,) = (tmp_path / "own").glob("*step=6.ckpt")
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=6, save_top_k=-1)
    assert_same_weights(fit(tmp_path / "parts", again, ckpt_path=first), whole)


def fit_one(member: dict[str, Any]) -> None:
    silent = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings: dict[str, Any] = {"limit_val_batches": 0, **dict.fromkeys(silent, False)}
    trainer = Trainer(accelerator="cpu", max_steps=2, **settings)
    trainer.fit(SideBySide([{"name": "a", **member}]), datamodule=ToyDataModule(4, 4, batch_size=8))


class Skips(ReLUSAE):
    """Would skip the rest of the epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1


class Ends(Callback):
    """Would end the run."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint, Ends])
def test_a_member_does_not_save_or_end_the_run_of_all(kind: Any) -> None:
    callback = EarlyStopping("val/fvu") if kind is EarlyStopping else kind()
    with pytest.raises(ValueError, match=r"move it to `trainer.callbacks`"):
        fit_one({"sae": ReLUSAE(4, 6), "callbacks": [callback]})


def test_a_member_does_not_end_the_epoch_of_all() -> None:
    with pytest.raises(ValueError, match="got -1.*train this SAE alone"):
        fit_one({"sae": Skips(4, 6)})
