"""Endless rows of a cache in random order, in bounded memory and with exact resume."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_sae.data.cache.rows import ByHook
from lightning_sae.data.cache.rows import Rows as CachedRows
from lightning_sae.data.loaders import ENDLESS, Rows
from lightning_sae.data.toy.stream import seed_of

PIECE_BYTES = 2**16
"""Bytes read in one piece if rows are not shuffled one by one."""

SHUFFLED_SINGLY_BYTES, SHUFFLED_SINGLY_ROWS = 4 * 2**30, 2**24
"""Up to this size in bytes, rows are shuffled one by one, because they fit into the page cache."""


class Order:
    """A different random order of all rows for each pass.

    Pieces of `together` neighbouring rows come in random order. With 1 all orders of the rows are
    equally likely.

    Args:
        n: Rows.
        together: Rows of a piece; the last one may be shorter.
        seed: Fixes the order of each pass.
    """

    def __init__(self, n: int, together: int, seed: int) -> None:
        self.n, self.together, self.seed = n, together, seed
        self._number = -1

    def between(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Indices of the rows from position `start` on, over consecutive passes.

        With pieces longer than 1, the requested rows of each pass are shuffled.
        """
        found = []
        while start < stop:
            number, first = divmod(start, self.n)
            end = min(first + stop - start, self.n)
            rows = self._of_pass(number, first, end)
            if self.together > 1:
                generator = torch.Generator().manual_seed(seed_of(self.seed, f"places {start}"))
                rows = rows[torch.randperm(len(rows), generator=generator)]
            found.append(rows)
            start += end - first
        return torch.cat(found)

    def _of_pass(self, number: int, first: int, end: int) -> Int[Tensor, " rows"]:
        if number != self._number:
            n_pieces = -(-self.n // self.together)
            generator = torch.Generator().manual_seed(seed_of(self.seed, f"pass {number}"))
            self._starts = torch.randperm(n_pieces, generator=generator) * self.together
            lengths = (self.n - self._starts).clamp_max(self.together)
            self._ends = lengths.cumsum(0)
            self._number = number
        if self.together == 1:
            return self._starts[first:end]
        low, high = torch.searchsorted(self._ends, torch.tensor([first, end - 1]), right=True)
        own = slice(int(low), int(high) + 1)
        starts, ends = self._starts[own], self._ends[own]
        lengths = (self.n - starts).clamp_max(self.together)
        before = ends[0] - lengths[0]  # position of the first row of these pieces
        shift = torch.repeat_interleave(starts - (ends - lengths), lengths)
        return (shift + before + torch.arange(len(shift)))[first - before : end - before]


class ShuffledRows(Iterator[Any]):
    """Endless batches of rows in random order.

    A window of rows is read at a time, in random pieces, shuffled, and served, while a thread reads
    the next one. In one pass each row is served once. Several ranks take turns: window k of rank r
    is window k * n_ranks + r of all. Memory: about three windows if rows are read in pieces,
    otherwise two.

    The number of served batches is the whole state, because any window can be read directly.

    Args:
        rows: The rows.
        batch_size: Rows in a batch.
        window: Approximate rows of a window: whole batches, and at most a rank's share of a pass.
        together: Neighbouring rows read in one piece; None chooses by the total size.
        seed: Fixes the order.
        rank: This process.
        n_ranks: Processes that share the rows.
        prefetch: Whether a thread reads ahead.
        given_as: Converts the rows of a batch to what is returned.

    Attributes:
        served: Batches served.
    """

    def __init__(
        self,
        rows: CachedRows,
        batch_size: int,
        window: int,
        together: int | None,
        seed: int,
        *,
        rank: int = 0,
        n_ranks: int = 1,
        prefetch: bool = True,
        given_as: Callable[[ByHook], Rows] = lambda rows: rows,
    ) -> None:
        self.rows, self.batch_size, self.given_as = rows, batch_size, given_as
        self.rank, self.n_ranks = rank, n_ranks
        most = max(min(window, len(rows) // n_ranks), batch_size)
        self.batches_per_window = most // batch_size
        self.window = self.batches_per_window * batch_size
        self.together = rows_together(rows) if together is None else together
        self.order = Order(len(rows), self.together, seed)
        self.served = 0
        self._reader = ThreadPoolExecutor(1, "cache") if prefetch else None
        self._number, self._ahead_number = -1, -1
        self._present: list[ByHook] = []
        self._ahead: Future[list[ByHook]] | None = None

    def __len__(self) -> int:
        return ENDLESS

    @property
    def passes(self) -> float:
        """Passes over the rows so far, of all ranks together."""
        return self.served * self.batch_size * self.n_ranks / len(self.rows)

    def __next__(self) -> Rows:
        number, place = divmod(self.served, self.batches_per_window)
        if number != self._number:
            self._open(number)
        self.served += 1
        return self.given_as({name: rows.float() for name, rows in self._present[place].items()})

    def _open(self, number: int) -> None:
        ahead = None if self._ahead is None else self._ahead.result()
        fits = ahead is not None and self._ahead_number == number
        self._present = ahead if ahead is not None and fits else self._read(number)
        self._number = number
        if self._reader is not None:
            self._ahead_number = number + 1
            self._ahead = self._reader.submit(self._read, number + 1)

    def _read(self, number: int) -> list[ByHook]:
        """The batches of a window."""
        start = (number * self.n_ranks + self.rank) * self.window
        index = self.order.between(start, start + self.window)
        if self.together == 1:
            return [self.rows.take(own) for own in index.split(self.batch_size)]
        ordered, places = index.sort()  # whole pieces at a time, regardless of their batch
        window = self.rows.read(ordered)
        back = torch.empty_like(places)
        back[places] = torch.arange(len(places))
        return [
            {name: rows.index_select(0, own) for name, rows in window.items()}
            for own in back.split(self.batch_size)
        ]

    def unread(self, n: int) -> ByHook | None:
        """Rows that this rank would serve next and nobody has served; its state stays as it is.

        None if a rank has fewer than `n` of them in the first pass: later ones were served before.
        """
        # The windows of the last rank are the last ones of a pass, so that it has the fewest.
        left = sum(stop - first for _, first, stop in self._unread(self.n_ranks - 1))
        if left < n:
            return None
        order = Order(self.order.n, self.together, self.order.seed)  # a thread uses the other
        found, missing = [], n
        for start, first, stop in self._unread(self.rank):
            found.append(order.between(start, stop)[first - start :][:missing])
            missing -= len(found[-1])
            if not missing:
                break
        return self.rows.take(torch.cat(found))

    def _unread(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """Windows of the first pass that are left: start, first unread position, and end."""
        number, place = divmod(self.served, self.batches_per_window)
        first = place * self.batch_size
        while (start := (number * self.n_ranks + rank) * self.window) + first < len(self.rows):
            yield start, start + first, min(start + self.window, len(self.rows))
            number, first = number + 1, 0

    def close(self) -> None:
        """Stop reading ahead."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches served, and the settings of the order."""
        return {"served": self.served, **self._settings()}

    def _settings(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "window": self.window,
            "together": self.together,
            "n_rows": len(self.rows),
            "ranks": self.n_ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; with other rows or ranks, from about the same place."""
        self.served = state["served"]
        saved = {name: state[name] for name in self._settings()}
        if saved == self._settings():
            return
        rows = self.served * saved["batch_size"] * saved["ranks"]
        windows = -(-rows // (self.window * self.n_ranks))
        self.served = windows * self.batches_per_window
        warnings.warn(
            f"The checkpoint has served rows in another order ({saved}, now {self._settings()}): "
            f"the run continues after as many rows; some may come twice, and some not at all.",
            stacklevel=2,
        )


def rows_together(rows: CachedRows) -> int:
    """Neighbouring rows to read in one piece: 1, or enough for fast reads from disk."""
    singly = len(rows) * rows.row_bytes <= SHUFFLED_SINGLY_BYTES
    if singly and len(rows) <= SHUFFLED_SINGLY_ROWS:
        return 1
    return max(1, PIECE_BYTES // rows.row_bytes)
