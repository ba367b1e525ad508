"""Memory that one step leaves to the next.

The C library gives large blocks back to the system when they are freed, and gets them anew page by
page, which can cost a step on a CPU as much time as what is then computed in them. GPUs need none
of this: torch keeps their memory itself.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


class Workspace:
    """Scratch for pre-activations, and the memory of gradients that were used up."""

    def __init__(self) -> None:
        self._scratch: Tensor | None = None
        self._used: list[Tensor] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_scratch": None, "_used": []}  # nothing to copy or to send to another process

    def scratch(self, rows: int, columns: int, like: Tensor) -> Float[Tensor, "rows columns"]:
        """Uninitialised memory of the kind of `like`, the same one each time."""
        kept = self._scratch
        if kept is None or kept.shape != (rows, columns) or not _alike(kept, like):
            self._scratch = kept = _empty(rows, columns, like)
        return kept

    def recycle(self, gradients: Iterable[Tensor | None]) -> None:
        """Keep the memory of gradients that nobody will read again."""
        matrices = [g for g in gradients if g is not None and g.ndim == 2 and not g.is_cuda]
        ordered = [g if g.is_contiguous() else g.mT for g in matrices]
        self._used = [g for g in ordered if g.is_contiguous()]

    def matrix(self, rows: int, columns: int, like: Tensor) -> Float[Tensor, "rows columns"]:
        """Uninitialised memory for a gradient, recycled where there is some; the caller owns it."""
        for index, kept in enumerate(self._used):
            if kept.shape == (rows, columns) and _alike(kept, like):
                return self._used.pop(index)
        return _empty(rows, columns, like)


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    with torch.inference_mode(mode=False):  # what is made under it could not be used in training
        return torch.empty(rows, columns, dtype=like.dtype, device=like.device)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def sums_into_memory(vectors: Tensor) -> bool:
    """Whether torch has a sparse product that writes into memory it is given."""
    on_cpu = vectors.device.type == "cpu" and torch.backends.mkl.is_available()
    return on_cpu and vectors.dtype in (torch.float32, torch.float64)


def keep_freed_blocks() -> None:
    """Let the C library keep blocks of up to 32 MiB that are freed, for those that come after.

    Linux's library gives a large block back to the system as soon as it is freed, and gets the next
    one page by page, which can take longer than what is then computed in it. What counts as large
    rises to the size of the largest such block freed so far, up to 32 MiB: so one is freed here,
    untouched. It holds no memory; other systems take no notice.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
