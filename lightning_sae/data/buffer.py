"""The shuffling buffer: activations in, shuffled batches out."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.checks import refuse
from lightning_sae.data.devices import current, picked, sent

PATIENCE = 100
"""Consecutive empty reads after which the buffer gives up."""


@runtime_checkable
class Source(Protocol):
    """An endless source of rows whose position can be saved and restored."""

    def read(self) -> Float[Tensor, "rows d"]:
        """Some more rows."""

    def state_dict(self) -> dict[str, Any]:
        """The position of the source."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""


class ShuffleBuffer(Iterator[Tensor]):
    """Holds `capacity` rows in random order and serves them in batches, each row once.

    When the share served reaches `refill_fraction`, the served rows are replaced by new ones and
    the whole buffer is shuffled again. A thread reads the new rows in the background.
    Memory: `capacity` rows, the new rows of one refill, and the rows of one `read` of the source.

    The state is exact: it holds the rows, their order, the generator, and the position of the
    source at the start of the current refill, which is read again after a resume.

    Args:
        source: Where rows come from.
        capacity: Rows held.
        batch_size: Rows in a batch.
        refill_fraction: Share served before a refill.
        seed: Seed of the shuffle.
        prefetch: Whether a thread reads ahead; otherwise rows are read when a refill is due. The
            batches are the same either way.
        look_at: Called with the rows of the first full buffer; must not change them.
        device: Where batches are used.
        rows_device: Where the rows lie. Batches are the same wherever it is.

    Attributes:
        seconds: Seconds spent waiting for batches, in this process.

    Raises:
        ValueError: If the batch does not fit into the buffer or the fraction is not in (0, 1].
    """

    def __init__(
        self,
        source: Source,
        capacity: int,
        batch_size: int,
        refill_fraction: float = 0.5,
        seed: int = 0,
        prefetch: bool = True,
        look_at: Callable[[Tensor], None] | None = None,
        device: torch.device | str = "cpu",
        rows_device: torch.device | str = "cpu",
    ) -> None:
        check_buffer(capacity, batch_size, refill_fraction)
        self.device, self.rows_device = torch.device(device), torch.device(rows_device)
        self.source = source
        self._look_at = look_at
        self.capacity = capacity
        self.batch_size = batch_size
        self.settings = {
            "buffer_size": capacity,
            "batch_size": batch_size,
            "refill_fraction": refill_fraction,
        }
        wanted = math.ceil(refill_fraction * capacity / batch_size) * batch_size
        self.rows_per_refill = min(wanted, capacity // batch_size * batch_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.served = 0
        self.seconds = 0.0
        self._closed = threading.Event()
        self.rows: Tensor | None = None
        self._reader = ThreadPoolExecutor(1, "activations") if prefetch else None
        self._surplus: Tensor | None = None

    def __next__(self) -> Float[Tensor, "batch_size d"]:
        """The next batch, float32, on `device`."""
        began = time.perf_counter()
        batch = self._next()
        self.seconds += time.perf_counter() - began
        return batch

    def _next(self) -> Float[Tensor, "batch_size d"]:
        if self.rows is None:
            self.fill()
        assert self.rows is not None
        if self.served == self.rows_per_refill:
            self._refill(self.rows)
        places = self.order[self.served : self.served + self.batch_size]
        self.served += self.batch_size
        return picked(self.rows, places, self.device).float()

    def fill(self) -> Float[Tensor, "capacity d"]:
        """Fill the empty buffer from the source."""
        self._request(self.capacity)
        self.rows = self._receive()
        if self._look_at is not None:
            self._look_at(self.rows)
        self._shuffle()
        return self.rows

    def _refill(self, rows: Tensor) -> None:
        rows.index_copy_(0, sent(self.order[: self.served], rows.device), self._receive())
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = torch.randperm(self.capacity, generator=self.generator)
        self.served = 0
        self._request(self.rows_per_refill)

    def _request(self, n: int) -> None:
        """Save the position of the source, then start reading `n` rows."""
        self._source_state = self.source.state_dict()
        self._surplus_before = self._surplus
        self._requested = n
        if self._reader is not None:
            self._fresh: Future[Tensor] = self._reader.submit(self._read_in_thread, n)

    def _receive(self) -> Tensor:
        return self._read(self._requested) if self._reader is None else self._fresh.result()

    def _read_in_thread(self, n: int) -> Tensor:
        with current(self.device):
            return self._read(n)

    def _read(self, n: int) -> Tensor:
        """The next `n` rows; surplus rows of a read are kept for the next call."""
        chunk = self._rows_of_source() if self._surplus is None else self._surplus
        rows, filled, in_vain = chunk.new_empty(n, chunk.shape[1]), 0, 0
        while in_vain < PATIENCE and not self._closed.is_set():
            taken = chunk[: n - filled]
            rows[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == n:
                self._surplus = chunk[len(taken) :].clone()
                return rows
            chunk = self._rows_of_source()
            in_vain = 0 if len(chunk) else in_vain + 1
        raise ValueError(
            f"{in_vain} passes of the model in a row gave no activation: all are left out. Widen "
            "`positions` or `max_norm_multiple`, or look at what `data/dropped_...` says."
        )

    def _rows_of_source(self) -> Tensor:
        return self.source.read().to(self.rows_device)

    def finish_reading(self) -> None:
        """Finish the refill under way; no batch may be asked for afterwards."""
        self._receive()

    def nbytes(self) -> int:
        """Size of the held rows in bytes."""
        return 0 if self.rows is None else self.rows.nbytes

    def state_dict(self, with_rows: bool = True) -> dict[str, Any]:
        """All that the next batches depend on; without the rows, a resume refills the buffer."""
        if self.rows is None:
            return {}
        state = {"source": self._source_state, "generator": self.generator.get_state()}
        if with_rows:
            surplus = self._surplus_before
            state |= {"rows": self.rows.to("cpu", copy=True), "order": self.order}
            state |= {"served": self.served, "settings": {**self.settings}}
            state |= {"surplus": None if surplus is None else surplus.cpu()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as if never interrupted, as far as `state` allows.

        Raises:
            ValueError: If the state belongs to a buffer with another capacity, batch size or
                refill.
        """
        if not state:
            return
        for name, value in state.get("settings", {}).items():
            if value != self.settings[name]:
                raise ValueError(
                    f"Expected argument `{name}` to be {value}, as in the checkpoint, but got "
                    f"{self.settings[name]}: resume with the settings of the run."
                )
        self.source.load_state_dict(state["source"])
        self.generator.set_state(state["generator"])
        if "rows" not in state:
            return
        self.rows = state["rows"].to(self.rows_device, copy=True)
        self.order, self.served = state["order"], state["served"]
        surplus = state["surplus"]
        self._surplus = None if surplus is None else surplus.to(self.rows_device)
        self._request(self.rows_per_refill)

    def close(self) -> None:
        """Stop reading ahead, also in the middle of a fill."""
        self._closed.set()
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)


def check_buffer(capacity: int, batch_size: int, refill_fraction: float) -> None:
    """Raise a ValueError if the buffer cannot have these sizes."""
    if not 0 < batch_size <= capacity:
        refuse(
            f"Expected argument `batch_size` to be between 1 and `buffer_size`={capacity} but got "
            f"{batch_size}: make the batch smaller or the buffer larger."
        )
    if not 0 < refill_fraction <= 1:
        refuse(
            f"Expected argument `refill_fraction` to be in (0, 1] but got {refill_fraction}: "
            "0.5 refills when half of the buffer is served."
        )
