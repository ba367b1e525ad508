"""Sparse autoencoders, one architecture per file."""

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.batch_topk import BatchTopKSAE
from lightning_sae.architectures.gated import GatedSAE
from lightning_sae.architectures.jumprelu import JumpReLUSAE
from lightning_sae.architectures.matryoshka import MatryoshkaSAE
from lightning_sae.architectures.relu import ReLUSAE
from lightning_sae.architectures.rescale_and_shift import RescaleAndShiftSAE
from lightning_sae.architectures.rescaled import RescaledSAE
from lightning_sae.architectures.tied import TiedSAE
from lightning_sae.architectures.topk import TopKSAE

__all__ = [
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "RescaleAndShiftSAE",
    "RescaledSAE",
    "SparseAutoencoder",
    "TiedSAE",
    "TopKSAE",
]
