"""Write activations to shards, in parts; an interrupted write continues exactly.

The text is split into parts as among the ranks of a run: part r of n reads every n-th document. A
rank writes one or several parts, so one rank can finish a cache that two ranks began. Each part has
a record, which is replaced after each shard and holds its shards, the sums for the statistics, and
the position in the text. Rows that are not on record are written again, bit for bit the same.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sae.data.cache.manifest import Shard, Split, require_size, require_types
from lightning_sae.data.cache.shards import POSITIONS, TOKENS, write_shard
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.scaling import require_precision
from lightning_sae.data.stream import REASONS
from lightning_sae.data.tokens import TokenBlocks
from lightning_sae.files import read_json, require_checksum, with_checksum, write_json

Told = Callable[[int], Any]
"""Called with the number of tokens of each forward pass."""


class Pass(NamedTuple):
    """The result of a forward pass for a cache.

    Attributes:
        rows: Activations that the filter keeps, by hook.
        tokens: Their tokens.
        positions: Their positions in their blocks.
        left_out: Number of activations left out by each reason of the filter.
        n_tokens: Tokens read.
    """

    rows: dict[str, Float[Tensor, "rows _"]]
    tokens: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    left_out: dict[str, int]
    n_tokens: int


def read_pass(data: ActivationDataModule, tokens: Int[Tensor, "blocks context_length"]) -> Pass:
    """Run the model on blocks of tokens; rows are of `data.dtype`, on the CPU.

    Raises:
        ValueError: If activations that the filter keeps are not finite.
    """
    activations = data.language_model.activations(tokens)
    left_out = data.filter.left_out(tokens, activations)
    kept = ~torch.stack(list(left_out.values())).any(0)
    rows = by_hook(data, activations[kept.to(activations.device)])
    stored = {name: part.to(data.dtype).cpu() for name, part in rows.items()}
    for name, part in stored.items():
        _require_finite(part, rows[name], name)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    counts = {reason: int(mask.sum()) for reason, mask in left_out.items()}
    return Pass(stored, tokens[kept].int(), positions[kept].int(), counts, tokens.numel())


def by_hook(data: ActivationDataModule, rows: Float[Tensor, "rows d"]) -> dict[str, Tensor]:
    """Rows as a dictionary, even for one hook."""
    found = data.by_hook(rows)
    return found if isinstance(found, dict) else {data.hook_names[0]: found}


def _require_finite(
    stored: Float[Tensor, "rows d"], rows: Float[Tensor, "rows d"], name: str
) -> None:
    if stored.isfinite().all():
        return
    if stored.dtype.itemsize < rows.dtype.itemsize:
        require_precision(rows, stored.dtype)  # too large for it?
    n = int((~stored.isfinite()).any(-1).sum())
    raise ValueError(
        f"{n} of {len(stored)} activations at {name} are not finite: look at the model and its "
        "dtype, or drop outliers by `max_norm_multiple`. The shards so far are kept."
    )


# Records.


def new_record() -> dict[str, Any]:
    """The record of a split before anything is written."""
    return {
        "shards": [],
        "passes": 0,
        "tokens": 0,
        "ended": False,
        "left_out": dict.fromkeys(REASONS, 0),
        "sums": {},
        "norms": {},
        "state": None,
    }


def record_path(folder: Path, part: int) -> Path:
    """Path of the record of a part."""
    return folder / f"part-{part}.json"


def read_records(folder: Path, part: int) -> dict[Split, dict[str, Any]]:
    """The records of a part by split.

    Raises:
        ValueError: If the record is damaged, or a recorded shard is missing.
    """
    path = record_path(folder, part)
    records = read_json(path) if path.is_file() else {}
    require_checksum(path, records)
    found: dict[Split, dict[str, Any]] = {"held_out": new_record(), "training": new_record()}
    try:
        for split, record in found.items():
            record |= records.get(split, {})
            require_types({**record, "state": record["state"] or {}}, KINDS)
            record["shards"] = [Shard(**shard) for shard in record["shards"]]
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"Could not read {path}: it is damaged ({error}). Restore the file, or write the cache "
            "again into another folder."
        ) from error
    for shard in (shard for record in found.values() for shard in record["shards"]):
        require_size(folder, shard)
    return found


KINDS: dict[str, type] = {
    "shards": list,
    "passes": int,
    "tokens": int,
    "ended": bool,
    "left_out": dict,
    "sums": dict,
    "norms": dict,
    "state": dict,
}
"""Types of a record's entries; `state` may also be None."""


def _write_records(folder: Path, part: int, records: dict[Split, dict[str, Any]]) -> None:
    plain: dict[str, Any] = {
        split: {**record, "shards": [shard._asdict() for shard in record["shards"]]}
        for split, record in records.items()
    }
    write_json(record_path(folder, part), with_checksum(plain))


# Writing.


def blocks_of(data: ActivationDataModule, split: Split, place: tuple[int, int]) -> TokenBlocks:
    """The blocks of a part's share of the documents, from the beginning."""
    return data.training_blocks(place) if split == "training" else data.held_out_blocks(place)


def write_part(
    data: ActivationDataModule,
    folder: Path,
    place: tuple[int, int],
    passes: dict[Split, int | None],
    shard_bytes: int,
    told: Told,
) -> None:
    """Write a part of a cache shard by shard, continuing from its record.

    A thread writes each shard while the model reads the next one. The record always lists every
    completely written shard.

    Args:
        data: The model, its text and filter.
        folder: The cache.
        place: Index of the part and number of parts.
        passes: Passes of the model, for each split; None for all of the text.
        shard_bytes: Approximate bytes of a shard.
        told: Called with the number of tokens of each pass.
    """
    records = read_records(folder, place[0])
    for split, wanted in passes.items():
        with ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for number, read, record in _shards(
                data, split, place, records[split], wanted, shard_bytes, told
            ):
                if written is not None:
                    written.result()
                name = f"{split}-{place[0]}-{number:05d}.safetensors"
                written = writer.submit(
                    _keep, folder / name, place[0], read, record, records, split
                )
            if written is not None:
                written.result()


def _keep(
    path: Path,
    part: int,
    read: list[Pass],
    record: dict[str, Any],
    records: dict[Split, dict[str, Any]],
    split: Split,
) -> None:
    """Write a shard, unless it has no rows, and then the record that lists it."""
    tensors = {name: torch.cat([p.rows[name] for p in read]) for name in read[0].rows}
    tokens = torch.cat([p.tokens for p in read])
    shards, sums, norms = (records[split][name] for name in ("shards", "sums", "norms"))
    if len(tokens):
        positions = torch.cat([p.positions for p in read])
        shards = [*shards, write_shard(path, {**tensors, TOKENS: tokens, POSITIONS: positions})]
        sums = {name: _sum(rows, sums.get(name)) for name, rows in tensors.items()}
        norms = {name: norms.get(name, 0.0) + _norms(rows) for name, rows in tensors.items()}
    records[split] = {**record, "shards": shards, "sums": sums, "norms": norms}
    _write_records(path.parent, part, records)


def _sum(rows: Float[Tensor, "rows d"], before: list[float] | None) -> list[float]:
    """Add the sum of rows to an earlier sum, in double precision."""
    total = torch.tensor(before or [0.0] * rows.shape[1], dtype=torch.float64)
    for part in rows.split(2**13):
        total += part.double().sum(0)
    return total.tolist()


def _norms(rows: Float[Tensor, "rows d"]) -> float:
    return sum(float(part.double().norm(dim=-1).sum()) for part in rows.split(2**13))


def _shards(
    data: ActivationDataModule,
    split: Split,
    place: tuple[int, int],
    begun: dict[str, Any],
    wanted: int | None,
    shard_bytes: int,
    told: Told,
) -> Iterator[tuple[int, list[Pass], dict[str, Any]]]:
    """For each further shard, yield its passes, its index, and the record after it."""
    if begun["ended"] or (wanted is not None and begun["passes"] >= wanted):
        return
    blocks = blocks_of(data, split, place)
    if begun["state"] is not None:
        rest = torch.tensor(begun["state"]["rest"], dtype=torch.int32)
        blocks.load_state_dict({**begun["state"], "rest": rest})
    number = len(begun["shards"])
    record = {**begun, "left_out": {**begun["left_out"]}}
    read: list[Pass] = []
    for done in count(begun["passes"] + 1):
        tokens = blocks.read_first_epoch(data.blocks_per_pass)
        if len(tokens):
            read.append(read_pass(data, tokens))
            _count(record, read[-1])
            told(read[-1].n_tokens)
        record |= {"passes": done, "ended": len(tokens) < data.blocks_per_pass}
        ends = record["ended"] or done == wanted
        if read and (ends or _nbytes(read) >= shard_bytes):
            state = blocks.state_dict()
            record["state"] = {**state, "rest": state["rest"].tolist()}
            yield number, read, record
            number, read = number + 1, []
            record = {**record, "left_out": {**record["left_out"]}}
        if ends:
            return


def _count(record: dict[str, Any], read: Pass) -> None:
    record["tokens"] += read.n_tokens
    for reason, n in read.left_out.items():
        record["left_out"][reason] += n


def _nbytes(read: list[Pass]) -> int:
    return sum(rows.nbytes for each in read for rows in each.rows.values())
