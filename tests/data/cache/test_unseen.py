"""Stored activations that no step has seen, with which a threshold is set when training ends."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_sae import BatchTopKSAE, CachedDataModule
from lightning_sae.data.cache.rows import Rows
from lightning_sae.data.cache.shuffled import ShuffledRows


def numbered(n: int) -> Rows:
    return Rows([{"": torch.arange(n, dtype=torch.float32)[:, None]}])


def batches_of(rank: int, n_ranks: int, together: int) -> ShuffledRows:
    return ShuffledRows(
        numbered(103), 4, 16, together, 0, rank=rank, n_ranks=n_ranks, prefetch=False
    )


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize("served", [0, 3, 7])
def test_unread_rows_are_those_that_no_rank_has_served_and_move_nothing(
    together: int, served: int
) -> None:
    of_ranks = [batches_of(rank, 2, together) for rank in range(2)]
    found = [next(batches)[""] for batches in of_ranks for _ in range(served)]
    before = [batches.state_dict() for batches in of_ranks]
    for batches in of_ranks:
        rest = batches.unread(17)
        assert rest is not None
        assert rest[""].shape == (17, 1)
        found.append(rest[""])
    rows = torch.cat(found)
    assert len(rows.unique()) == len(rows) == 8 * served + 34
    assert [batches.state_dict() for batches in of_ranks] == before
    untouched = batches_of(1, 2, together)
    untouched.served = served
    assert torch.equal(next(untouched)[""], next(of_ranks[1])[""])


def test_all_ranks_have_as_many_unread_rows_as_the_last_or_none() -> None:
    of_ranks = [batches_of(rank, 2, 1) for rank in range(2)]
    for batches in of_ranks:
        batches.served = 9
    # 12 rows of the last whole window are left to each; those behind it are the first rank's.
    assert [batches.unread(12) is None for batches in of_ranks] == [False, False]
    assert [batches.unread(13) is None for batches in of_ranks] == [True, True]


class AsksAtTheEnd(Callback):
    """Asks for unseen activations after the last step, and notes the position around it."""

    rows: Tensor | None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: CachedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        before = data.state_dict()
        self.rows = data.unseen(40)
        assert data.state_dict() == before


def trained(x: Tensor, steps: int, **arguments: Any) -> tuple[BatchTopKSAE, Tensor | None]:
    torch.manual_seed(0)
    sae, end = BatchTopKSAE(x.shape[1], 32, k=3, lr=0.01), AsksAtTheEnd()
    data = CachedDataModule(x, batch_size=20, validation_fraction=0.25, **arguments)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[end],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(sae, data)
    return sae, end.rows


def test_after_the_first_pass_held_out_rows_that_are_not_evaluated_are_unseen() -> None:
    x = torch.randn(400, 8)  # 300 for training
    few = {"n_validation": 30, "n_test": 50}
    for steps, arguments, expected in [
        (10, {}, x[:300]),
        (15, {}, None),
        (15, few, x[350:390]),
    ]:
        _, rows = trained(x, steps, **arguments)
        if expected is None:
            assert rows is None
            continue
        assert rows is not None
        assert len(rows) == 40
        assert bool((rows[:, None] == expected[None]).all(-1).any(-1).all())


def test_the_threshold_is_that_of_rows_which_were_not_trained_on() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 16, generator=generator)
    x = (torch.rand(40_000, 24, generator=generator) < 0.1).float() @ features
    sae, _ = trained(x, 60, n_validation=100, n_test=100)
    held_out = x[30_000:]
    l0 = (sae.encode(held_out) > 0).sum(-1).double().mean().item()
    assert l0 == pytest.approx(3, rel=0.02)
