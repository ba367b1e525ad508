"""Memory reused between training steps on a CPU.

The C library returns large blocks to the system when they are freed and gets new ones page by page,
which can take as long as the computation that uses them. On GPUs torch caches memory itself.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


class Workspace:
    """Scratch memory for pre-activations, and memory recycled from old gradients."""

    def __init__(self) -> None:
        self._scratch: Tensor | None = None
        self._used: list[Tensor] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_scratch": None, "_used": []}  # do not copy or pickle scratch memory

    def scratch(self, rows: int, columns: int, like: Tensor) -> Float[Tensor, "rows columns"]:
        """Uninitialized memory with dtype and device of `like`, the same on each call."""
        kept = self._scratch
        if kept is None or kept.shape != (rows, columns) or not _alike(kept, like):
            self._scratch = kept = _empty(rows, columns, like)
        return kept

    def recycle(self, gradients: Iterable[Tensor | None]) -> None:
        """Keep the memory of gradients that are no longer needed."""
        matrices = [g for g in gradients if g is not None and g.ndim == 2 and not g.is_cuda]
        ordered = [g if g.is_contiguous() else g.mT for g in matrices]
        self._used = [g for g in ordered if g.is_contiguous()]

    def matrix(self, rows: int, columns: int, like: Tensor) -> Float[Tensor, "rows columns"]:
        """Uninitialized memory for a gradient, recycled if possible; the caller owns it."""
        for index, kept in enumerate(self._used):
            if kept.shape == (rows, columns) and _alike(kept, like):
                return self._used.pop(index)
        return _empty(rows, columns, like)


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    with torch.inference_mode(mode=False):  # inference tensors cannot be used in training
        return torch.empty(rows, columns, dtype=like.dtype, device=like.device)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def sums_into_memory(vectors: Tensor) -> bool:
    """Whether torch's sparse product can write into given memory."""
    on_cpu = vectors.device.type == "cpu" and torch.backends.mkl.is_available()
    return on_cpu and vectors.dtype in (torch.float32, torch.float64)


def keep_freed_blocks() -> None:
    """Make the C library keep freed blocks of up to 32 MiB for reuse.

    glibc returns large blocks to the system when they are freed. The size from which a block counts
    as large grows to that of the largest such block freed so far, up to 32 MiB, so one of almost
    that size is allocated and freed here without being touched. This holds no memory, and is a
    no-op on other systems.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
