"""The interface that every library is measured through, and the list of libraries."""

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.measure import Watch


@dataclass(frozen=True)
class Task:
    """Settings of one training run.

    Attributes:
        architecture: `relu`, `gated`, `jumprelu`, `topk` or `batchtopk`.
        d_in: Width of the activations.
        d_sae: Number of latents.
        batch_size: Activations in a batch.
        n_steps: Optimizer steps.
        l0: Target of active latents on average, for architectures with a threshold.
        k: Number of active latents, for the TopK family.
        lr: Learning rate.
        l1_coefficient: Weight of the penalty against a squared error summed over `d_in`.
        seed: Seed of the weights.
        variant: Name of a setting of the library that differs from its default.
        device: `cpu` or `cuda`.
        precision: `32-true`, or `bf16-mixed`: products in bfloat16, each library by its own means.
    """

    architecture: str
    d_in: int
    d_sae: int
    batch_size: int
    n_steps: int
    l0: int = 64
    k: int = 32
    lr: float = 1e-9  # so small that the density set beforehand stays
    l1_coefficient: float = 1.0
    seed: int = 0
    variant: str = ""
    device: str = "cpu"
    precision: str = "32-true"


class Contender(ABC):
    """An SAE of one library and its training loop.

    Args:
        task: The training.
    """

    @abstractmethod
    def __init__(self, task: Task) -> None: ...

    @abstractmethod
    def train(self, watch: Watch) -> None:
        """Train by the library's own loop on the batches of `watch`, until there are no more."""

    @property
    @abstractmethod
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder."""

    @abstractmethod
    def set_threshold(self, threshold: float) -> None:
        """Make latents active where `x @ W_enc` is above `threshold`."""

    @abstractmethod
    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        """Mean number of active latents, as in training."""

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Latent activations."""
        raise NotImplementedError

    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """Reconstruction from latent activations."""
        raise NotImplementedError

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder."""
        raise NotImplementedError

    def note(self) -> str:
        """A remark to show with the figures."""
        return ""


class Library(NamedTuple):
    """Where a library's `Contender` is defined, and what it can train.

    Attributes:
        module: Module of the class `Trained`, a `Contender`.
        distribution: Name on the package index.
        architectures: Architectures that it has.
        variants: Variants to measure by architecture; by default only the plain one.
    """

    module: str
    distribution: str
    architectures: tuple[str, ...]
    variants: dict[str, tuple[str, ...]] = {}  # noqa: RUF012  (never changed)

    def load(self) -> type[Contender]:
        """Import the library and return its `Contender`."""
        trained: type[Contender] = importlib.import_module(self.module).Trained
        return trained


ALL = ("relu", "topk", "gated", "jumprelu", "batchtopk")
OURS = "lightning-sae"
LIBRARIES = {
    OURS: Library("benchmarks.libraries.ours", "lightning-sae", ALL),
    "SAELens": Library("benchmarks.libraries.saelens", "sae-lens", ALL),
    "dictionary_learning": Library(
        "benchmarks.libraries.dictionary_learning_", "dictionary-learning", ALL
    ),
    "sparsify": Library(
        "benchmarks.libraries.sparsify_", "eai-sparsify", ("topk",), {"topk": ("adam", "signum")}
    ),
}


@torch.no_grad()
def calibrate(contender: Contender, task: Task, x: Float[Tensor, "batch d_in"]) -> None:
    """Set the threshold so that `task.l0` latents are active, except in the TopK family."""
    if task.architecture in ("topk", "batchtopk"):
        return
    products = (x @ contender.W_enc).flatten()
    contender.set_threshold(products.topk(task.l0 * len(x) + 1).values.min().item())
