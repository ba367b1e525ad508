"""Where activations lie, and how they get to the device that trains on them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sae.checks import expect

SHARE_OF_FREE = 0.5
"""A buffer lies on a GPU if it takes at most this share of the free memory there."""


def require_device(name: str) -> None:
    """Raise a ValueError unless `buffer_device` is `auto` or a device that torch knows."""
    try:
        known = name == "auto" or torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    expect(known, "buffer_device", "`auto`, `cpu` or a GPU such as `cuda` or `cuda:1`", name)


def place_of_buffer(asked: str, training: torch.device, nbytes: float) -> torch.device:
    """The device on which a buffer lies.

    Args:
        asked: The argument `buffer_device`. `auto` is the device of training, if that is a GPU and
            has room.
        training: The device of training.
        nbytes: Size of the buffer and of the rows that are read for it.

    Raises:
        ValueError: If there is no such device.
    """
    if asked != "auto":
        place = torch.device(asked)
        there = place.type == "cpu" or (place.index or 0) < torch.cuda.device_count()
        expect(there, "buffer_device", "one of the devices of this machine", f"{asked}: use `auto`")
        return place
    has_room = training.type == "cuda" and nbytes <= SHARE_OF_FREE * free_memory(training)
    return training if has_room else torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A GPU as the current one of this thread, whose current one is otherwise the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def picked(
    rows: Float[Tensor, "rows d"], places: Int[Tensor, " batch"], device: torch.device
) -> Float[Tensor, "batch d"]:
    """Some of the rows, on a device.

    From the CPU to a GPU they are copied from pinned memory, so that the CPU goes on.
    """
    if rows.device.type != "cpu" or device.type != "cuda":
        return rows.index_select(0, sent(places, rows.device)).to(device)
    kind = {"dtype": rows.dtype, "pin_memory": True}
    found = torch.empty((len(places), rows.shape[1]), **kind)  # type: ignore[call-overload]
    return torch.index_select(rows, 0, places, out=found).to(device, non_blocking=True)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU without waiting for it."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
