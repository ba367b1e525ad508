import itertools

import pytest
import torch
from torch import Tensor

from lightning_sae.data.toy import stream as toy_stream
from lightning_sae.data.toy.stream import Blocks, HeldOutToyBatches, ToyBatches, seed_of


def draw(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, 2, generator=generator)


def blocks(batch_size: int = 4, seed: int = 0, stream: str = "train", rank: int = 0) -> Blocks:
    """Blocks of five batches of four rows of two numbers."""
    return Blocks(draw, 2, batch_size, seed, stream, rank)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_stream, "BLOCK_BYTES", 4 * 2 * 4 * 5)


def first(n: int, batches: ToyBatches) -> list[Tensor]:
    return list(itertools.islice(batches, n))


def test_batches_are_the_rows_of_the_blocks_in_order() -> None:
    made = blocks()
    assert made.batches_per_block == 5
    served = torch.cat(first(12, ToyBatches(made)))
    expected = torch.cat([made[0], made[1], made[2]])[:48]
    assert torch.equal(served, expected)


def test_every_block_has_numbers_of_its_own() -> None:
    made = blocks()
    rows = torch.cat([made[number] for number in range(20)])
    assert len(rows.unique(dim=0)) == len(rows) == 400


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": "test"}, {"rank": 1}])
def test_another_seed_stream_or_rank_has_other_numbers(other: dict) -> None:
    one = torch.cat(first(10, ToyBatches(blocks())))
    two = torch.cat(first(10, ToyBatches(blocks(**other))))
    assert len(torch.cat([one, two]).unique(dim=0)) == 80


def test_seeds_of_ranks_are_not_those_of_other_runs() -> None:
    seeds = {seed_of(seed, "train", rank) for seed in range(10) for rank in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 13])
def test_a_stream_goes_on_from_its_state(n: int) -> None:
    whole = first(20, ToyBatches(blocks()))
    stream = ToyBatches(blocks())
    first(n, stream)
    other = ToyBatches(blocks())
    other.load_state_dict(stream.state_dict())
    assert torch.equal(torch.stack(first(20 - n, other)), torch.stack(whole[n:]))


def test_a_state_may_be_loaded_into_a_stream_in_use() -> None:
    whole = first(9, ToyBatches(blocks()))
    stream = ToyBatches(blocks())
    first(3, stream)
    stream.load_state_dict({"served": 8, "batch_size": 4})
    assert torch.equal(next(stream), whole[8])


def test_a_state_of_one_rank_serves_every_other() -> None:
    whole = first(9, ToyBatches(blocks(rank=1)))
    stream = ToyBatches(blocks(rank=0))
    first(7, stream)
    other = ToyBatches(blocks(rank=1))
    other.load_state_dict(stream.state_dict())
    assert torch.equal(next(other), whole[7])


def test_a_state_of_another_batch_size_is_refused() -> None:
    state = ToyBatches(blocks(batch_size=3)).state_dict()
    with pytest.raises(
        ValueError, match="`batch_size` to be 3, as in the checkpoint, but got 4: r"
    ):
        ToyBatches(blocks()).load_state_dict(state)


@pytest.mark.parametrize(
    ("n", "sizes"), [(8, [4, 4]), (9, [4, 4, 1]), (3, [3]), (30, [4] * 7 + [2])]
)
def test_held_out_samples_are_so_many_and_the_same_each_time(n: int, sizes: list[int]) -> None:
    held_out = HeldOutToyBatches(blocks(), n)
    batches = list(held_out)
    assert [len(batch) for batch in batches] == sizes
    assert len(held_out) == len(sizes)
    assert torch.equal(torch.cat(list(held_out)), torch.cat(batches))
