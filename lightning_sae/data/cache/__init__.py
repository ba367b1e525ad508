"""Activations on the disk: written once, trained on often, with neither model nor text."""

from lightning_sae.data.cache.datamodule import CachedDataModule as CachedDataModule
from lightning_sae.data.cache.write import write_cache as write_cache

__all__ = ["CachedDataModule", "write_cache"]
