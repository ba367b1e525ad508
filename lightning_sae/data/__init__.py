"""Tokens to a language model to shuffled activations; toy worlds with known features."""

from lightning_sae.data.datamodule import ActivationDataModule as ActivationDataModule
from lightning_sae.data.source import ActivationSource as ActivationSource
from lightning_sae.data.toy import ToyDataModule as ToyDataModule

__all__ = ["ActivationDataModule", "ActivationSource", "ToyDataModule"]
