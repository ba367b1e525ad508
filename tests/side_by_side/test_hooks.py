"""A member's callback gets each hook that it would get if its SAE were trained alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE, SideBySide

HOOKS = [name for name in dir(Callback) if name.startswith("on_") and "checkpoint" not in name]


class Recorder(Callback):
    """Notes the hooks that are called, each with the shapes of the tensors it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []


def recording(name: str) -> Any:
    def hook(self: Recorder, trainer: Any, pl_module: Any, *args: Any, **_: Any) -> None:
        assert isinstance(pl_module, ReLUSAE)
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
        self.calls.append((name, shapes))

    return hook


for hook_name in HOOKS:
    setattr(Recorder, hook_name, recording(hook_name))


class Rows(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.d_in = 4
        self.x = torch.randn(48, 4)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.x, batch_size=16)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def stages(run: Trainer, model: Any, recorder: Recorder) -> Iterator[tuple[str, list[Any]]]:
    """The calls of each stage of a run."""
    for stage in ("fit", "validate", "test", "predict"):
        recorder.calls = []
        getattr(run, stage)(model, datamodule=Rows())
        yield stage, recorder.calls


@pytest.mark.filterwarnings("ignore:.*predict returned None if it was on several GPUs.*")
def test_a_member_gets_the_hooks_that_it_would_get_alone(tmp_path: Path) -> None:
    alone, member = Recorder(), Recorder()
    sae = ReLUSAE(4, 6, decoder_norm="free")
    expected = dict(stages(trainer(tmp_path / "alone", alone), sae, alone))
    sae = ReLUSAE(4, 6, decoder_norm="free")
    together = SideBySide([{"name": "one", "sae": sae, "callbacks": [member]}])
    found = dict(stages(trainer(tmp_path / "together"), together, member))
    assert {"on_sanity_check_start", "on_validation_batch_end"} <= {c for c, _ in expected["fit"]}
    for stage, calls in expected.items():
        assert sorted(found[stage]) == sorted(calls), stage
    for stage in ("validate", "test", "predict"):
        assert found[stage] == expected[stage]
