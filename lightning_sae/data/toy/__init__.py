"""Synthetic activations made of known features."""

from lightning_sae.data.toy.datamodule import ToyDataModule as ToyDataModule

__all__ = ["ToyDataModule"]
