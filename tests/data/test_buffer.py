import io
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sae.data.buffer import ShuffleBuffer

D = 37


class Numbers:
    """Rows that hold their own number, a few at a time."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float32, ends: int = 2**60) -> None:
        self.sizes, self.dtype, self.ends = sizes or (7,), dtype, ends
        self.next = self.reads = 0

    def read(self) -> Tensor:
        if self.next >= self.ends:
            raise OSError("the text is gone")
        size = self.sizes[self.reads % len(self.sizes)]
        rows = torch.arange(self.next, self.next + size, dtype=self.dtype)[:, None].repeat(1, D)
        self.next += size
        self.reads += 1
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "reads": self.reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.reads = state["next"], state["reads"]


class Memory(TorchDispatchMode):
    """The most bytes that tensors held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
            self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self.alive.values()))
        return result


def numbers(rows: Tensor) -> list[int]:
    """The rows' numbers, after a look at their being whole rows."""
    assert (rows == rows[:, :1]).all()
    return [int(n) for n in rows[:, 0]]


def served(buffer: ShuffleBuffer, n: int) -> list[list[int]]:
    return [numbers(next(buffer)) for _ in range(n)]


def flat(batches: list[list[int]]) -> list[int]:
    return [n for batch in batches for n in batch]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize(
    ("capacity", "batch_size", "refill_fraction", "sizes"),
    [
        (24, 4, 0.5, (7,)),
        (24, 5, 0.5, (3, 50, 1)),  # batches that do not divide the buffer; reads larger than it
        (20, 20, 1.0, (20,)),
        (21, 4, 1.0, (6, 0, 2)),  # a read may give nothing
        (16, 3, 0.01, (4,)),
    ],
)
def test_every_row_is_served_once_or_still_held(
    capacity: int, batch_size: int, refill_fraction: float, sizes: tuple[int, ...], prefetch: bool
) -> None:
    settings = (capacity, batch_size, refill_fraction)
    buffer = ShuffleBuffer(Numbers(*sizes), *settings, prefetch=prefetch)
    out: list[int] = []
    for _ in range(60):
        batch = numbers(next(buffer))
        assert len(batch) == batch_size
        out += batch
        assert buffer.rows is not None
        assert len(buffer.rows) == capacity
        held = numbers(buffer.rows[buffer.order[buffer.served :]])
        # Together they are the first rows of the source, none missing and none twice.
        assert sorted(out + held) == list(range(len(out) + len(held)))
    assert len(out) > 2 * capacity
    buffer.close()


@pytest.mark.parametrize(
    ("refill_fraction", "batches_before"), [(0.5, 2), (0.25, 1), (0.6, 3), (1.0, 4)]
)
def test_a_refill_is_due_when_its_share_is_served(
    refill_fraction: float, batches_before: int
) -> None:
    buffer = ShuffleBuffer(Numbers(4), 16, 4, refill_fraction, prefetch=False)
    for _ in range(batches_before):
        next(buffer)
    source: Any = buffer.source
    assert source.next == 16
    next(buffer)
    assert source.next == 16 + 4 * batches_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_capacity_a_refill_and_little_more(dtype: torch.dtype) -> None:
    buffer = ShuffleBuffer(Numbers(10, dtype=dtype), 1000, 20, prefetch=False)
    with Memory() as memory:
        for _ in range(60):
            next(buffer)
    row = D * torch.finfo(dtype).bits // 8
    assert buffer.nbytes() == 1000 * row
    little = 4 * 10 * row + 3 * 20 * D * 4 + 3 * 1000 * 8  # reads, batches, orders
    assert (1000 + 500) * row < memory.peak <= (1000 + 500) * row + little


def test_batches_mix_rows_of_many_reads() -> None:
    buffer = ShuffleBuffer(Numbers(16), 256, 32, prefetch=False)
    for batch in served(buffer, 40)[4:]:
        assert len({n // 16 for n in batch}) >= 8
        assert batch != sorted(batch)


def test_the_seed_fixes_the_order_and_the_global_generator_has_no_part() -> None:
    def batches(seed: int) -> list[list[int]]:
        torch.manual_seed(seed + 100)
        return served(ShuffleBuffer(Numbers(), 24, 4, seed=seed, prefetch=False), 20)

    state = torch.get_rng_state()
    first = served(ShuffleBuffer(Numbers(), 24, 4, seed=1, prefetch=False), 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert batches(1) == first
    assert batches(2) != first


def test_reading_ahead_changes_nothing_but_when_the_source_is_read() -> None:
    sources = Numbers(5, 9), Numbers(5, 9)
    ahead, due = (
        ShuffleBuffer(source, 24, 4, prefetch=prefetch)
        for source, prefetch in zip(sources, (True, False), strict=True)
    )
    assert served(ahead, 50) == served(due, 50)
    deadline = time.monotonic() + 10
    while sources[0].next <= sources[1].next and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread may not have had its turn yet
    ahead.close()
    assert sources[0].next > sources[1].next


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("sizes", [(7,), (40, 1)])
def test_a_buffer_goes_on_bit_for_bit_from_any_batch(
    sizes: tuple[int, ...], prefetch: bool
) -> None:
    for n_before in range(14):  # refills come after every third batch
        buffer = ShuffleBuffer(Numbers(*sizes), 24, 4, seed=5, prefetch=prefetch)
        served(buffer, n_before)
        state = buffer.state_dict()
        expected = served(buffer, 20)  # the state is a copy: going on does not change it
        resumed = ShuffleBuffer(Numbers(*sizes), 24, 4, seed=6, prefetch=not prefetch)
        if n_before == 0:
            assert state == {}
            resumed.generator.manual_seed(5)
        resumed.load_state_dict(through_a_file(state))
        assert served(resumed, 20) == expected
        buffer.close()
        resumed.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_buffer_that_is_filled_but_not_served_goes_on_too(prefetch: bool) -> None:
    buffer = ShuffleBuffer(Numbers(), 24, 4, prefetch=prefetch)
    buffer.fill()
    resumed = ShuffleBuffer(Numbers(), 24, 4, seed=6, prefetch=prefetch)
    resumed.load_state_dict(through_a_file(buffer.state_dict()))
    assert served(resumed, 9) == served(buffer, 9)
    buffer.close()
    resumed.close()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("n_before", [1, 3, 4, 11])
def test_without_its_rows_a_buffer_is_filled_anew_with_what_follows(
    n_before: int, prefetch: bool
) -> None:
    buffer = ShuffleBuffer(Numbers(6), 24, 4, prefetch=prefetch)
    served(buffer, n_before)
    state = through_a_file(buffer.state_dict(with_rows=False))
    assert not any(isinstance(v, Tensor) and v.ndim == 2 for v in state.values())
    refills = (n_before - 1) // 3
    resumed = ShuffleBuffer(Numbers(6), 24, 4, prefetch=prefetch)
    resumed.load_state_dict(state)
    out = flat(served(resumed, 30))
    assert len(out) == len(set(out))
    assert min(out) == 24 + 12 * refills
    assert sorted(out)[:24] == list(range(min(out), min(out) + 24))
    buffer.close()
    resumed.close()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("ends", [0, 10, 30, 41])
def test_what_goes_wrong_in_the_source_is_raised_where_batches_are_asked_for(
    ends: int, prefetch: bool
) -> None:
    buffer = ShuffleBuffer(Numbers(ends=ends), 24, 4, prefetch=prefetch)
    whole = 3 * max(0, (ends - 24) // 12 + 1)
    out = flat(served(buffer, whole))
    assert len(out) == len(set(out)) == 4 * whole
    with pytest.raises(OSError, match="the text is gone"):
        next(buffer)
    buffer.close()


def test_rows_are_kept_in_their_dtype_and_served_in_float32() -> None:
    buffer = ShuffleBuffer(Numbers(dtype=torch.bfloat16), 24, 4, prefetch=False)
    assert next(buffer).dtype == torch.float32
    assert buffer.rows is not None
    assert buffer.rows.dtype == torch.bfloat16


def test_a_batch_is_a_copy() -> None:
    buffer = ShuffleBuffer(Numbers(24), 24, 4, prefetch=False)
    next(buffer).fill_(-1.0)
    assert buffer.rows is not None
    assert numbers(buffer.rows) == list(range(24))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((48, 4, 0.5), "`buffer_size` to be 24, as in the checkpoint, but got 48"),
        ((24, 8, 0.5), "`batch_size` to be 4, as in the checkpoint, but got 8"),
        ((24, 4, 0.25), "`refill_fraction` to be 0.5, as in the checkpoint, but got 0.25"),
    ],
)
def test_the_state_of_another_kind_of_buffer_is_refused(
    settings: tuple[int, int, float], message: str
) -> None:
    buffer = ShuffleBuffer(Numbers(), 24, 4, prefetch=False)
    next(buffer)
    with pytest.raises(ValueError, match=message):
        ShuffleBuffer(Numbers(), *settings, prefetch=False).load_state_dict(buffer.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((24, 25, 0.5), "`batch_size` to be between 1 and `buffer_size`=24 but got 25"),
        ((24, 0, 0.5), "`batch_size` to be between 1 and .* got 0"),
        ((24, 4, 0.0), r"`refill_fraction` to be in \(0, 1\] but got 0.0"),
        ((24, 4, 1.5), r"`refill_fraction` to be in \(0, 1\] but got 1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShuffleBuffer(Numbers(), *settings)


def test_closing_ends_the_thread_that_reads_ahead() -> None:
    buffer = ShuffleBuffer(Numbers(), 24, 4)
    next(buffer)
    assert buffer._reader is not None
    threads = list(buffer._reader._threads)
    assert [thread.is_alive() for thread in threads] == [True]
    buffer.close()
    assert not any(thread.is_alive() for thread in threads)


class Nothing:
    """A source all of whose rows are left out."""

    def read(self) -> Tensor:
        return torch.zeros(0, 2)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_source_that_gives_nothing_ends_the_run_instead_of_hanging_it(prefetch: bool) -> None:
    buffer = ShuffleBuffer(Nothing(), 8, 4, prefetch=prefetch)
    with pytest.raises(ValueError, match="100 passes .* gave no activation: all are left out"):
        next(buffer)
    buffer.close()
