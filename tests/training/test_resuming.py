"""What may change when a run goes on, as `docs/resuming.md` says: all of its table."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_sae import JumpReLUSAE, ReLUSAE, SideBySide, TopKSAE, ToyDataModule
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup, RunCheckpoint
from lightning_sae.functional.penalties import Sqrt


class Mine(Callback):
    """A user's own callback."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight


def sae_of(kind: Any = ReLUSAE, **arguments: Any) -> Any:
    torch.manual_seed(0)
    rates = {"lr": 0.01, "lr_warmup_steps": 0, "lr_decay_steps": 0}
    return kind(8, 16, **{**rates, **arguments})


def fit(
    root: Path, module: Any, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any
) -> Trainer:
    data = {name[5:]: settings.pop(name) for name in list(settings) if name[:5] == "data_"}
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    flags = {"max_steps": 8, "limit_val_batches": 0, **dict.fromkeys(silent, False), **settings}
    trainer = Trainer(
        default_root_dir=root, accelerator="cpu", callbacks=[*callbacks, RunCheckpoint(4)], **flags
    )
    source = ToyDataModule(**{"n_features": 6, "d_in": 8, "batch_size": 16, **data})
    trainer.fit(module, datamodule=source, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of four steps."""
    root = tmp_path_factory.mktemp("run")
    fit(root, sae_of(l1_coefficient=0.1), L1Warmup(3), Mine(), max_steps=4)
    return root / "checkpoints" / "last.ckpt"


CHANGING: dict[str, dict[str, Any]] = {
    "model.lr: 0.002 (was 0.01)": {"lr": 0.002},
    "model.l1_coefficient: 0.7 (was 0.1)": {"l1_coefficient": 0.7},
    "model.betas: (0.5, 0.9) (was (0.9, 0.999))": {"betas": (0.5, 0.9)},
    "model.lr_decay_steps: 2 (was 0)": {"lr_decay_steps": 2},
    "model.clip_grad_norm: 0.5 (was 1.0)": {"clip_grad_norm": 0.5},
    "trainer.max_steps: 9 (was 4)": {"max_steps": 9},
    "trainer.gradient_clip_val: 2.0 (was None)": {"gradient_clip_val": 2.0},
    "trainer.gradient_clip_algorithm: value (was None)": {
        "gradient_clip_algorithm": "value",
        "gradient_clip_val": 0.01,
    },
    "trainer.limit_train_batches: 3 (was 1.0)": {"limit_train_batches": 3},
    "model.penalty.class_path: lightning_sae.functional.penalties.Sqrt (was None)": {
        "penalty": Sqrt()
    },
    "callbacks.Mine.weight: 3.0 (was 1.0)": {"callbacks": [L1Warmup(3), Mine(3.0)]},
    "callbacks: DecoderNormProjection, L1Warmup (was DecoderNormProjection, L1Warmup, Mine)": {
        "callbacks": [L1Warmup(3)]
    },
}
FIXED: dict[str, dict[str, Any]] = {
    "`data.batch_size` to be 16 but got 32": {"data_batch_size": 32},
    "`data.seed` to be 0 but got 1": {"data_seed": 1},
    "`data.noise` to be 0.0 but got 0.1": {"data_noise": 0.1},
    "`trainer.accumulate_grad_batches` to be 1 but got 2": {"accumulate_grad_batches": 2},
    "`trainer.precision` to be 32-true but got bf16-mixed": {"precision": "bf16-mixed"},
    "`callbacks.L1Warmup.n_steps` to be 3 but got 4": {"callbacks": [L1Warmup(4), Mine()]},
    "`model.apply_b_dec_to_input` to be True but got False": {"apply_b_dec_to_input": False},
    "`model.decoder_norm` to be unit but got free": {"decoder_norm": "free"},
    "`model.decoder_init_norm` to be 1.0 but got 0.1": {
        "decoder_norm": "free",
        "decoder_init_norm": 0.1,
    },
    "`model.b_dec_init` to be mean but got zero": {"b_dec_init": "zero"},
    "`trainer.overfit_batches` to be 0.0 but got 2": {"overfit_batches": 2},
    "`trainer.max_steps` to be at least 4": {"max_steps": 3},
}
OF_TRAINER = {
    "max_steps",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "precision",
    "limit_train_batches",
    "overfit_batches",
}


def go_on(root: Path, last: Path, changes: dict[str, Any]) -> Trainer:
    changes = dict(changes)
    callbacks = changes.pop("callbacks", None) or [L1Warmup(3), Mine()]
    flags = {n: changes.pop(n) for n in list(changes) if n in OF_TRAINER or n[:5] == "data_"}
    sae = sae_of(**{"l1_coefficient": 0.1, **changes})
    return fit(root, sae, *callbacks, ckpt_path=last, **flags)


@pytest.mark.parametrize("said", CHANGING)
def test_a_changed_setting_applies_and_is_reported(
    said: str, last: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    changes = CHANGING[said]
    trainer = go_on(tmp_path, last, changes)
    assert f"  {said}\n" in f"{caplog.text}\n"
    (group,) = trainer.optimizers[0].param_groups
    assert group["betas"] == changes.get("betas", (0.9, 0.999))
    assert trainer.global_step == changes.get("max_steps", 8)
    if "lr_decay_steps" not in changes:
        assert group["lr"] == changes.get("lr", 0.01)


@pytest.mark.parametrize("message", FIXED)
def test_what_may_not_change_is_refused(message: str, last: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        go_on(tmp_path / "run", last, FIXED[message])
    assert not (tmp_path / "run").exists()


def test_a_penalty_that_is_left_out_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, sae_of(penalty=Sqrt()), max_steps=4)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    fit(tmp_path, sae_of(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert "  model.penalty: None (was " in caplog.text


def test_another_architecture_and_width_are_refused(last: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint of `TopKSAE` but it holds `ReLUSAE`"):
        fit(tmp_path, sae_of(TopKSAE, k=3), ckpt_path=last)
    with pytest.raises(ValueError, match=r"set the `d_in` and `d_sae` it was made with"):
        fit(tmp_path, ReLUSAE(8, 32), ckpt_path=last)


def test_where_thresholds_started_may_not_change(tmp_path: Path) -> None:
    fit(tmp_path, sae_of(JumpReLUSAE, threshold_init=0.1), max_steps=4)
    with pytest.raises(ValueError, match="`model.threshold_init` to be 0.1 but got 0.2"):
        fit(
            tmp_path,
            sae_of(JumpReLUSAE, threshold_init=0.2),
            ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
        )


def test_another_seed_is_refused(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    fit(tmp_path, sae_of(), max_steps=4)
    seed_everything(4, verbose=False)
    with pytest.raises(ValueError, match="`seed_everything` to be 3 but got 4"):
        fit(tmp_path, sae_of(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_k_may_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, sae_of(TopKSAE, k=3), max_steps=4)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    sae = sae_of(TopKSAE, k=2)
    fit(tmp_path, sae, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert "  model.k: 2 (was 3)" in caplog.text
    assert (sae.encode(torch.randn(5, 8)) > 0).sum(-1).max() <= 2


def test_unchanged_settings_are_not_reported(
    last: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    go_on(tmp_path, last, {"data_n_test": 100, "max_steps": 4})
    assert "These settings" not in caplog.text


def test_a_member_is_held_to_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def together(lr: float, n_steps: int) -> SideBySide:
        callbacks = [DecoderNormProjection(), L1Warmup(n_steps)]
        return SideBySide([{"name": "a", "sae": sae_of(lr=lr), "callbacks": callbacks}])

    fit(tmp_path, together(0.01, 3), max_steps=4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="`members.a.callbacks.L1Warmup.n_steps` to be 3 but got"):
        fit(tmp_path, together(0.01, 4), ckpt_path=last)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    resumed = together(0.002, 3)
    fit(tmp_path, resumed, ckpt_path=last)
    assert "  members.a.lr: 0.002 (was 0.01)" in caplog.text
    assert resumed.members[0].optimizer.param_groups[0]["lr"] == 0.002


def test_the_seed_of_a_member_may_not_change(tmp_path: Path) -> None:
    def together(seed: int) -> SideBySide:
        described = {"class_path": "lightning_sae.ReLUSAE", "init_args": {"d_sae": 16}}
        return SideBySide([{"name": "a", "sae": described, "seed": seed}], d_in=8)

    fit(tmp_path, together(1), max_steps=4)
    with pytest.raises(ValueError, match="`members.a.seed` to be 1 but got 2"):
        fit(tmp_path, together(2), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
