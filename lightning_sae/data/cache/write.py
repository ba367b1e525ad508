"""Write a cache: plan it, write its parts on one or several ranks, and describe it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric import Fabric
from tqdm import tqdm

from lightning_sae.checks import require_integers, require_not_negative, require_positive
from lightning_sae.data.cache.description import completed, describe, require_same_data
from lightning_sae.data.cache.manifest import (
    FILE,
    SPLITS,
    Split,
    is_cache,
    read_manifest,
    write_manifest,
)
from lightning_sae.data.cache.plan import make_plan, require_room, tell, tokens_of_text
from lightning_sae.data.cache.writer import read_records, write_part
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.files import remove_unfinished

try:
    import fcntl
except ImportError:  # Windows, which has no `fcntl`: nothing is locked
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 2**27


class Work(NamedTuple):
    """The work of the ranks.

    Attributes:
        n_parts: Parts of the cache.
        shard_bytes: Approximate bytes of a shard.
        passes: Passes of the model for each part, by split; None for all of the text.
        tokens: Approximate number of tokens of all parts together.
    """

    n_parts: int
    shard_bytes: int
    passes: dict[Split, int | None]
    tokens: int


def write_cache(
    data: ActivationDataModule,
    output: str | Path,
    *,
    tokens: int | None = None,
    held_out: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    plan_only: bool = False,
    fabric: Fabric | None = None,
) -> Path:
    """Write the activations of a text to disk, to train on them repeatedly or elsewhere.

    The rows equal those of the stream bit for bit, in the same order and in the dtype of `data`. If
    interrupted, a call with the same arguments continues from the last complete shard. With more
    `tokens`, a complete cache is extended.

    Args:
        data: The language model, its hooks, text and filter.
        output: Folder of the cache: new, or one to continue.
        tokens: Approximate number of training tokens to read; None for one pass over the text.
        held_out: Approximate number of held-out tokens to read; None for `data.n_test`.
        shard_bytes: Approximate bytes of a shard.
        plan_only: Print the estimate, and write nothing.
        fabric: A launched `lightning.Fabric`, if several ranks write.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds something else, or a cache of another model, hook, dtype or
            text.
        OSError: If the disk has too little space.

    Example:
        .. code-block:: python

            write_cache(ActivationDataModule("blocks.2.hook_resid_post"), "cache", tokens=10**6)
            data = CachedDataModule("cache")
    """
    require_integers(shard_bytes=shard_bytes)
    require_positive(shard_bytes=shard_bytes, **({} if tokens is None else {"tokens": tokens}))
    require_not_negative(held_out=held_out or 0)
    fabric = fabric or Fabric(accelerator="auto", devices=1)
    folder = Path(output)
    wanted: dict[Split, int | None] = {"held_out": _held_out(data, held_out), "training": tokens}
    data.language_model.to(fabric.device)
    with _held(folder) if fabric.is_global_zero and not plan_only else nullcontext():
        n_ranks = fabric.world_size
        work = _of_first(
            fabric, lambda: _begin(data, folder, wanted, shard_bytes, plan_only, n_ranks)
        )
        if plan_only:
            return folder
        own = range(fabric.global_rank, work.n_parts, n_ranks)
        with _bar(folder, work, own, fabric) as bar:
            for part in own:
                place = (part, work.n_parts)
                write_part(data, folder, place, work.passes, work.shard_bytes, bar.update)
        fabric.barrier()
        _of_first(fabric, lambda: _finish(folder, work))
    return folder


def _held_out(data: ActivationDataModule, held_out: int | None) -> int:
    has_any = data.validation_fraction > 0 or data.validation_text is not None
    return (data.n_test if held_out is None else held_out) if has_any else 0


def _of_first(fabric: Fabric, find: Callable[[], Any]) -> Any:
    """The result of rank 0 on all ranks; if rank 0 fails, all fail."""
    found, failure = None, None
    if fabric.is_global_zero:
        try:
            found = find()
        except (ValueError, OSError) as error:
            if fabric.world_size == 1:
                raise
            failure = error
    found, failure = fabric.broadcast((found, failure))
    if failure is not None:
        raise failure
    return found


def _begin(
    data: ActivationDataModule,
    folder: Path,
    wanted: dict[Split, int | None],
    shard_bytes: int,
    plan_only: bool,
    n_ranks: int,
) -> Work:
    """Plan the work, check it, and write the first manifest."""
    _require_new_or_cache(folder)
    manifest = describe(data, n_ranks, shard_bytes)
    if is_cache(folder):
        saved = read_manifest(folder)
        require_same_data(folder, saved, manifest)
        manifest = saved
    n_parts = manifest.settings["parts"]
    records = [read_records(folder, part) for part in range(n_parts)]
    per_pass = n_parts * data.blocks_per_pass * data.context_length
    passes = {split: None if n is None else -(-n // per_pass) for split, n in wanted.items()}
    tokens = {split: tokens_of_text(data) if n is None else n for split, n in wanted.items()}
    left = {
        split: max(0, tokens[split] - sum(record[split]["tokens"] for record in records))
        for split in wanted
        if not all(_is_done(record[split], passes[split]) for record in records)
    }
    work = Work(n_parts, manifest.settings["shard_bytes"], passes, sum(tokens.values()))
    if not plan_only:
        remove_unfinished(folder, "*.safetensors")
        remove_unfinished(folder, "*.json")
    if left:
        done = sum(s.rows for r in records for split in SPLITS for s in r[split]["shards"])
        left = {split: left.get(split, 0) for split in SPLITS}
        plan = make_plan(data, folder, left, done, n_ranks)
        tell(plan, data, folder, n_ranks)
        require_room(plan)
        if not plan_only:
            folder.mkdir(parents=True, exist_ok=True)
            write_manifest(folder, manifest._replace(complete=False, shards={}))
    return work


def _is_done(record: dict[str, Any], passes: int | None) -> bool:
    return record["ended"] or (passes is not None and record["passes"] >= passes)


def _finish(folder: Path, work: Work) -> None:
    parts = [read_records(folder, part) for part in range(work.n_parts)]
    write_manifest(folder, completed(folder, read_manifest(folder), parts))


def _require_new_or_cache(folder: Path) -> None:
    unfinished = f".{FILE}."  # of a process that was killed while it wrote the first manifest
    files = [folder] if folder.is_file() else folder.glob("*")
    if not is_cache(folder) and not all(file.name.startswith(unfinished) for file in files):
        raise ValueError(
            f"Expected argument `output` to be a new or empty folder, or a cache to continue, "
            f"but {folder} holds other files: choose another folder."
        )


def _bar(folder: Path, work: Work, own: range, fabric: Fabric) -> Any:
    """Progress in tokens of this rank's parts; rank 0 shows it."""
    records = [read_records(folder, part) for part in own]
    return tqdm(
        total=work.tokens * len(own) // work.n_parts,
        initial=sum(record[split]["tokens"] for record in records for split in SPLITS),
        unit=" tokens",
        unit_scale=True,
        desc="Caching" if fabric.world_size == 1 else f"Caching, rank 0 of {fabric.world_size}",
        disable=not fabric.is_global_zero,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock `folder` against other writers; remove it afterwards if it was created and is empty.

    Raises:
        ValueError: If another process writes there.
    """
    if fcntl is None or folder.is_file():
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)
        if made and not any(folder.iterdir()):  # nothing was written
            folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"Expected argument `output` to be an unused folder but another process writes a "
            f"cache into {folder}: choose another folder, or wait for its end."
        ) from error
    except OSError:  # a file system without locks
        return
