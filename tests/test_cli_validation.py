"""How often a run on the command line validates."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sae.cli import main
from lightning_sae.commands import run

TOY = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=lightning_sae.callbacks.DecoderNormProjection",
    "--progress_bar.refresh_rate=0",
    "--model=ReLUSAE",
    "--model.d_sae=16",
    "--data=lightning_sae.ToyDataModule",
    "--data.n_features=8",
    "--data.d_in=8",
    "--data.batch_size=32",
    "--data.n_validation=64",
]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ([], [4]),  # a short run validates at its end
        (["--trainer.accumulate_grad_batches=3"], [4]),
        (["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"], [2, 4]),
        (["--trainer.limit_train_batches=1"], [1, 2, 3, 4]),  # as Lightning: after each epoch
        (["--trainer.limit_val_batches=0"], []),
    ],
)
def test_a_run_is_validated_though_its_stream_has_no_epochs(
    arguments: list[str], steps: list[int], tmp_path: Path
) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", *TOY, "--trainer.max_steps=4", root, *arguments])
    assert validated_at(tmp_path) == steps


def test_a_long_run_is_validated_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "VALIDATE_EVERY", 3)
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", *TOY, "--trainer.max_steps=7", root])
    assert validated_at(tmp_path) == [3, 6]


def validated_at(root: Path) -> list[int]:
    """The steps after which it validated; Lightning's loggers count them from 0."""
    events = EventAccumulator(str(root / "tensorboard")).Reload()
    if "val/fvu" not in events.Tags()["scalars"]:
        return []
    return [event.step + 1 for event in events.Scalars("val/fvu")]
