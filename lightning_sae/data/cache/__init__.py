"""Activation caches on disk: written once, then used for training without the model or its text."""

from lightning_sae.data.cache.datamodule import CachedDataModule as CachedDataModule
from lightning_sae.data.cache.write import write_cache as write_cache

__all__ = ["CachedDataModule", "write_cache"]
