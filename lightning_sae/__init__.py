"""Train and study sparse autoencoders on a language model's activations with PyTorch Lightning."""

from lightning_sae.architectures import ReLUSAE as ReLUSAE
from lightning_sae.architectures import SparseAutoencoder as SparseAutoencoder
from lightning_sae.data import ActivationDataModule as ActivationDataModule
from lightning_sae.saving import load as load
from lightning_sae.version import __version__ as __version__

__all__ = ["ActivationDataModule", "ReLUSAE", "SparseAutoencoder", "__version__", "load"]
