"""One paper, one LightningModule, one file."""

from lightning_sae.architectures.base import SparseAutoencoder as SparseAutoencoder
from lightning_sae.architectures.base import Step as Step
from lightning_sae.architectures.relu import ReLUSAE as ReLUSAE

__all__ = ["ReLUSAE", "SparseAutoencoder", "Step"]
