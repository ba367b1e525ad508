"""What SAEs and callbacks ask of the data that they are trained on."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer

from lightning_sae import ActivationSource
from lightning_sae.data.source import source_of


class Rows(ActivationSource):
    """A source that sets its width and nothing else."""

    d_in = 4

    def train_dataloader(self) -> list[torch.Tensor]:
        return [torch.ones(2, 4)]


def test_only_the_width_and_dataloaders_have_to_be_given() -> None:
    rows = Rows()
    assert (rows.source, rows.scaling(), rows.statistics()) == ({}, None, {})
    assert rows.at("a hook") is rows


def test_data_of_several_hooks_has_to_give_each_alone() -> None:
    rows = Rows()
    rows.hook_names = ["a", "b"]
    with pytest.raises(NotImplementedError, match="Rows has no `at` for hook b"):
        rows.at("b")


def test_a_run_has_a_source_only_if_its_data_is_one() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    assert source_of(trainer) is None
    for data, found in ((LightningDataModule(), False), (Rows(), True)):
        trainer.datamodule = data  # type: ignore[attr-defined]
        assert (source_of(trainer) is data) == found
