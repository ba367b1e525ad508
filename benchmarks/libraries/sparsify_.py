"""sparsify, trained by its `Trainer.fit` on a stand-in model that returns given activations."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from typing_extensions import override

from benchmarks.libraries.base import Contender, Task
from benchmarks.measure import Watch


class Activations(nn.Module):
    """Stand-in for a language model: ignores its tokens, its one layer returns `present`."""

    config = SimpleNamespace(num_hidden_layers=1)

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.device = torch.device(task.device)
        self.layer = nn.Identity()
        self.present = torch.zeros(task.batch_size, task.d_in, device=task.device)
        tokens = torch.zeros(1, task.batch_size, dtype=torch.long, device=task.device)
        self.dummy_inputs = {"input_ids": tokens}

    @property
    def base_model(self) -> nn.Module:
        """The model itself, as `transformers` models have it."""
        return self

    @override
    def forward(self, input_ids: Int[Tensor, "1 batch"]) -> Float[Tensor, "1 batch d_in"]:
        return self.layer(self.present.unsqueeze(0))


class Served(IterableDataset[dict[str, Tensor]]):
    """The batches of a `Watch` as a data set with one sequence per batch."""

    def __init__(self, watch: Watch, model: Activations) -> None:
        self.watch = watch
        self.model = model

    def __len__(self) -> int:
        return len(self.watch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.watch:
            self.model.present = batch
            yield {"input_ids": torch.zeros(len(batch), dtype=torch.long)}


class Unsaved(Trainer):
    """sparsify's trainer, without saving at the end."""

    def save(self) -> None:
        """Do nothing."""


class Trained(Contender):
    """A sparse coder; the variant is the optimizer, `adam` or `signum`, which is its default.

    On a GPU it computes in bfloat16, whatever the precision asked for.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = Activations(task)
        config = TrainConfig(
            SparseCoderConfig(num_latents=task.d_sae, k=task.k),
            batch_size=1,
            optimizer=task.variant or "signum",
            lr=task.lr,
            hookpoints=["layer"],
            init_seeds=[task.seed],
            log_to_wandb=False,
        )
        self.trainer = Unsaved(config, _Sized(task.n_steps + 1), self.model)
        self.coder: Any = self.trainer.saes["layer"]

    @override
    def train(self, watch: Watch) -> None:
        self.trainer.dataset = Served(watch, self.model)
        self.trainer.fit()

    @property
    @override
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.coder.encoder.weight.T

    @override
    def set_threshold(self, threshold: float) -> None:
        """Do nothing: k sets the L0."""

    @override
    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        return self.coder.encode(x).top_acts.count_nonzero().item() / len(x)

    @override
    def note(self) -> str:
        return self.task.variant


class _Sized:
    """Stand-in for the data set while the trainer is built, which only reads its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length
