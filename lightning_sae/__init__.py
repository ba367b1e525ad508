"""Train and study sparse autoencoders on a language model's activations with PyTorch Lightning."""

from lightning_sae.analysis import FeatureStore
from lightning_sae.architectures import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    RescaledSAE,
    SparseAutoencoder,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.data import (
    ActivationDataModule,
    ActivationSource,
    CachedDataModule,
    ToyDataModule,
    write_cache,
)
from lightning_sae.distributed.split import SplitDictionary
from lightning_sae.loading import load
from lightning_sae.side_by_side import SideBySide
from lightning_sae.version import __version__

__all__ = [
    "ActivationDataModule",
    "ActivationSource",
    "BatchTopKSAE",
    "CachedDataModule",
    "FeatureStore",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "RescaleAndShiftSAE",
    "RescaledSAE",
    "SideBySide",
    "SparseAutoencoder",
    "SplitDictionary",
    "TiedSAE",
    "TopKSAE",
    "ToyDataModule",
    "__version__",
    "load",
    "write_cache",
]
