"""Runs in each layout of codes, and with each kind of gradients' memory."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE
from tests.ranks.cases import QUIET


class Layouts(NamedTuple):
    """Layout of codes, rows of a chunk, and whether gradients lie in the ranks' buckets."""

    dense: bool
    chunk_rows: int | None
    buckets: bool = False


LAYOUTS = {
    "sparse": Layouts(dense=False, chunk_rows=5),
    "buckets": Layouts(dense=False, chunk_rows=5, buckets=True),
    "dense": Layouts(dense=True, chunk_rows=None),
    "cut": Layouts(dense=True, chunk_rows=7),
}


def inputs() -> Tensor:
    """Four batches of each of two ranks."""
    return torch.randn(4, 2, 16, 4, generator=torch.Generator().manual_seed(0))


def fit_layout(case: Layouts, batches: Tensor, seed: int, **flags: Any) -> dict[str, Tensor]:
    """Weights after four steps; the seed draws the first ones."""
    torch.manual_seed(seed)
    sae = ReLUSAE(4, 24, lr=0.01, decoder_norm="free", chunk_rows=case.chunk_rows)
    sae.layout.dense = case.dense
    sae.layout.thresholds = (-1.0, -1.0) if case.dense else (2.0, 2.0)
    trainer = Trainer(**{**QUIET, "max_steps": 4, "precision": "64-true", **flags})
    trainer.fit(sae, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return dict(sae.state_dict())


def fit_layouts(rank: int) -> dict[str, dict[str, Tensor]]:
    """Weights of one of two ranks. Ranks draw different weights; all start from the first's."""
    found = {}
    for name, case in LAYOUTS.items():
        strategy = DDPStrategy(gradient_as_bucket_view=case.buckets)
        found[name] = fit_layout(case, inputs()[:, rank], rank, strategy=strategy, devices=2)
    return found
