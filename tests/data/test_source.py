"""What SAEs and callbacks ask of the data that they are trained on."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lightning_sae import ActivationSource, TopKSAE
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


class Described(Rows):
    """Rows that say where they are from."""

    def __init__(self, **source: object) -> None:
        super().__init__()
        self._source = source

    @property
    def source(self) -> dict[str, object]:
        return self._source

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.ones(2, 4), batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ({"document_start": "none"}, "document_start bos to none"),
        ({"model": "b"}, "model a to b"),
        ({"text": "another text"}, None),
    ],
)
def test_another_model_or_rule_of_text_in_evaluation_is_said(
    present: dict[str, str], said: str | None
) -> None:
    trained = {"model": "a", "document_start": "bos", "text": "a text"}
    sae = TopKSAE(d_in=4, d_sae=8, k=2)
    sae.is_trained, sae.source = True, trained
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(sae, datamodule=Described(**trained | present), verbose=False)
    found = [str(w.message) for w in caught if "trained on other activations" in str(w.message)]
    assert [str(said) in message for message in found] == ([True] if said else [])
