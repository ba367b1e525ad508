"""What only one rank knows of a run, in a file beside the checkpoint.

Rank 0 writes the checkpoint. It holds weights, moments and schedules, which are the same on all
ranks, and beside them what rank 0 alone has: its buffer, its place in the text and the like. Each
other rank writes its own of these beside it, `last.ckpt` having `last.ckpt.step-400.rank-1`.

All parts are complete before the checkpoint takes the place of an earlier one, and parts of earlier
steps go only after it: whenever a run is killed, the checkpoint's own parts are there.
"""

from pathlib import Path
from typing import Any

import torch

from lightning_sae.saving import write_atomically

SHARED = {"state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters"}
"""Entries of a checkpoint that are the same on all ranks."""


def part_of(path: Path, step: int, rank: int) -> Path:
    """The file of a rank beside the checkpoint of some step."""
    return path.with_name(f"{path.name}.step-{step}.rank-{rank}")


def write_part(path: Path, rank: int, checkpoint: dict[str, Any]) -> None:
    """Write what a rank's own checkpoint holds beyond the one of rank 0 at `path`."""
    own = {name: value for name, value in checkpoint.items() if name not in SHARED}
    part = part_of(path, checkpoint["global_step"], rank)
    write_atomically(part, lambda temporary: torch.save(own, temporary))


def take_part(path: Path, rank: int, checkpoint: dict[str, Any]) -> None:
    """Put a rank's own entries into the checkpoint that was read from `path`, if it has any."""
    part = part_of(path, checkpoint["global_step"], rank)
    if part.is_file():
        checkpoint.update(torch.load(part, map_location="cpu", weights_only=True))


def remove_other_parts(path: Path, step: int) -> None:
    """Remove what was written beside earlier checkpoints at `path`."""
    for part in path.parent.glob(f"{path.name}.step-*.rank-*"):
        if not part.name.startswith(f"{path.name}.step-{step}."):
            part.unlink(missing_ok=True)
