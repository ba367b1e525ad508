"""Tokens to a language model to shuffled activations; toy worlds with known features."""

from lightning_sae.data.datamodule import ActivationDataModule as ActivationDataModule
from lightning_sae.data.toy import ToyDataModule as ToyDataModule

__all__ = ["ActivationDataModule", "ToyDataModule"]
