"""Tokens to a language model to shuffled activations."""

from lightning_sae.data.datamodule import ActivationDataModule as ActivationDataModule

__all__ = ["ActivationDataModule"]
