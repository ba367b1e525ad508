"""Numbers that a device computes, read without making the CPU wait for the device.

A GPU works through a queue. Reading a number of a tensor, as `item`, `nonzero` or `if` do, waits
until the queue is empty, and the GPU is then idle until the CPU has queued new work.
"""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


def waiting_is_slow(device: torch.device) -> bool:
    """Whether reading a number of a tensor on this device waits for queued work."""
    return device.type != "cpu"


class Copied:
    """A copy of a tensor in the CPU's memory, made while both devices go on.

    Args:
        values: The tensor.
    """

    def __init__(self, values: Shaped[Tensor, "..."]) -> None:
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            kind: dict[str, Any] = {"dtype": values.dtype, "pin_memory": True}
            self._copy = torch.empty(values.shape, **kind)
            self._copy.copy_(values.detach(), non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._copy = values.detach().to("cpu", copy=True)

    def read(self) -> Shaped[Tensor, "..."]:
        """The values. Waits only for work that was queued before the copy."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self._copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_copy": self.read().clone(), "_done": None}


class Behind:
    """Shows numbers of a device on the CPU: on a GPU those of the call before.

    The first call waits for its own.
    """

    def __init__(self) -> None:
        self._last: Copied | None = None

    def __call__(self, values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
        """The values, or those of the call before."""
        if not waiting_is_slow(values.device):
            return values
        before, self._last = self._last, Copied(values)
        return (before or self._last).read()


class Remembered:
    """The value of a scalar tensor, which is read again only after the tensor has changed."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._version = -1
        self._value = 0.0

    def of(self, scalar: Shaped[Tensor, ""]) -> float:
        """The present value of the tensor."""
        if self._of is not scalar or self._version != scalar._version:
            self.note(scalar, scalar.item())
        return self._value

    def note(self, scalar: Shaped[Tensor, ""], value: float) -> None:
        """Take over a value that is known to be that of the tensor."""
        self._of, self._version, self._value = scalar, scalar._version, value

    def __getstate__(self) -> dict[str, Any]:
        return Remembered().__dict__
