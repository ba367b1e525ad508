"""From text to shuffled activations of a language model; toy data with known features."""

from lightning_sae.data.cache import CachedDataModule as CachedDataModule
from lightning_sae.data.cache import write_cache as write_cache
from lightning_sae.data.datamodule import ActivationDataModule as ActivationDataModule
from lightning_sae.data.source import ActivationSource as ActivationSource
from lightning_sae.data.toy import ToyDataModule as ToyDataModule

__all__ = [
    "ActivationDataModule",
    "ActivationSource",
    "CachedDataModule",
    "ToyDataModule",
    "write_cache",
]
