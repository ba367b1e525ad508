"""Estimate the rows, bytes and hours of a cache, and check the free disk space."""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_sae.data.cache.manifest import Split
from lightning_sae.data.cache.shards import free_bytes
from lightning_sae.data.cache.writer import Pass, read_pass
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.notices import say_unknown, unknown_token
from lightning_sae.data.text import IndexedCorpus
from lightning_sae.data.tokens import TokenBlocks

TIMED_PASSES = 3
COUNTED_TOKENS = 2**18
"""Number of tokens from which the length of a longer text is estimated."""

PER_ROW = 8
"""Bytes of a row's token and position."""


class Plan(NamedTuple):
    """The remaining work for a cache.

    Attributes:
        rows: Rows to be written, by split.
        done: Rows that are already written.
        nbytes: Bytes to be written.
        free: Bytes that may be written to the disk.
        tokens_per_second: Speed of the model on this rank.
        seconds: Time with all ranks working in parallel.
    """

    rows: dict[Split, int]
    done: int
    nbytes: int
    free: int
    tokens_per_second: float
    seconds: float


def tokens_of_text(data: ActivationDataModule) -> int:
    """Approximate number of tokens of the training text; exact for a short text.

    Raises:
        ValueError: If the text is a stream, whose length is unknown.
    """
    blocks = data.training_blocks((0, 1))
    found = 0
    while found < COUNTED_TOKENS:
        read = blocks.read_first_epoch(data.blocks_per_pass).numel()
        found += read
        if blocks.epoch > 0:
            return found
    if not isinstance(data.corpus, IndexedCorpus):
        raise ValueError(
            "Expected argument `tokens` to be a number, for the text is a stream whose length is "
            "not known, but got none: say how many tokens to read."
        )
    return round(found * len(data.corpus.documents) / max(1, blocks.document - 1))


def make_plan(
    data: ActivationDataModule,
    folder: Path,
    tokens: dict[Split, int],
    done: int,
    n_ranks: int,
) -> Plan:
    """Run the model on a few passes of the text, and estimate the whole.

    Args:
        data: The model and its text.
        folder: The cache.
        tokens: Tokens still to be read, by split.
        done: Rows that are already written.
        n_ranks: Ranks that read.
    """
    passes, rate = _tried(data, data.training_blocks((0, 1)))
    read = sum(each.n_tokens for each in passes)
    share = sum(len(each.tokens) for each in passes) / read
    rows: dict[Split, int] = {split: round(share * n) for split, n in tokens.items()}
    row_bytes = sum(part.shape[1] * part.element_size() for part in passes[0].rows.values())
    nbytes = sum(rows.values()) * (row_bytes + PER_ROW)
    seconds = sum(tokens.values()) / rate / n_ranks
    return Plan(rows, done, nbytes, free_bytes(folder), rate, seconds)


def _tried(data: ActivationDataModule, blocks: TokenBlocks) -> tuple[list[Pass], float]:
    """A few passes, and the tokens per second of all but the first."""
    passes, ends = [], []
    unknown, stranger = 0, unknown_token(data.language_model.tokenizer)
    for _ in range(TIMED_PASSES + 1):
        tokens = blocks.read(data.blocks_per_pass)
        unknown += 0 if stranger is None else int((tokens == stranger).sum())
        passes.append(read_pass(data, tokens))
        ends.append(_now(data))
    if unknown:
        say_unknown(unknown, sum(each.n_tokens for each in passes), "training")
    seconds = max(ends[-1] - ends[0], 1e-9)
    return passes, sum(each.n_tokens for each in passes[1:]) / seconds


def _now(data: ActivationDataModule) -> float:
    if data.language_model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tell(plan: Plan, data: ActivationDataModule, folder: Path, n_ranks: int) -> None:
    """Print a plan."""
    widths = data.d_in if isinstance(data.d_in, dict) else {data.hook_names[0]: data.d_in}
    at = ", ".join(f"{name} of width {width}" for name, width in widths.items())
    there = f"; {plan.done:,} are there already" if plan.done else ""
    training, held_out = plan.rows["training"], plan.rows["held_out"]
    dtype = str(data.dtype).removeprefix("torch.")
    sys.stdout.write(
        f"A cache in {folder}:\n"
        f"  rows  about {training:,} for training and {held_out:,} held out{there}\n"
        f"        {at}, {dtype}\n"
        f"  disk  about {size(plan.nbytes)} needed, {size(plan.free)} may be written\n"
        f"  time  about {hours(plan.seconds)}: {plan.tokens_per_second:,.0f} tokens/s "
        f"on {data.language_model.device.type}, {n_ranks} rank{'s' if n_ranks > 1 else ''}\n"
    )
    sys.stdout.flush()


def require_room(plan: Plan) -> None:
    """Raise an OSError if the plan would fill the disk."""
    if plan.nbytes <= plan.free:
        return
    per_row = plan.nbytes / sum(plan.rows.values())
    fitting = max(0, int(plan.free / per_row))
    raise OSError(
        f"The disk has no room for the cache: about {size(plan.nbytes)} are needed and "
        f"{size(plan.free)} may be written, which leaves a little of the disk free. About "
        f"{fitting:,} rows fit: give fewer `--tokens`, a shorter `--data.dtype`, fewer hooks, "
        "or another disk."
    )


def size(nbytes: float) -> str:
    """A number of bytes in readable units."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def hours(seconds: float) -> str:
    """A time in readable units."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
