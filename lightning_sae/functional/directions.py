"""Random directions that need not all be in memory at once."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.functional.geometry import unit_rows

PIECE = 2**24  # entries drawn at a time


class RandomUnitRows:
    """The rows that `random_unit_rows` would draw now, for drawing some of them at a time.

    Torch's generator of the CPU moves on as if all of them had been drawn: they are, piece by
    piece, and dropped again. The generator's state before each piece (5 KB) is kept, so that any
    rows can be drawn later, with the same values bit for bit.

    Args:
        rows: Number of rows.
        d: Their width.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> some = RandomUnitRows(100, 3).draw(range(40, 60))
        >>> _ = torch.manual_seed(0)
        >>> bool((some == unit_rows(torch.randn(100, 3))[40:60]).all())
        True
    """

    def __init__(self, rows: int, d: int) -> None:
        self.shape = rows, d
        self.dtype = torch.get_default_dtype()
        self._pieces = list(pairwise(_bounds(rows, d)))
        self._states: list[Tensor] = []
        for first, last in self._pieces:
            self._states.append(torch.get_rng_state())
            self._normal(last - first, torch.default_generator)

    def draw(self, wanted: range) -> Float[Tensor, "wanted d"]:
        """Some rows at equal distances. Beside them it needs memory for two pieces."""
        found = torch.empty(len(wanted), self.shape[1], dtype=self.dtype, device="cpu")
        generator = torch.Generator()
        for (first, last), state in zip(self._pieces, self._states, strict=True):
            before, until = (
                len(range(wanted.start, bound, wanted.step)) for bound in (first, last)
            )
            own = wanted[before:until]
            if own:
                generator.set_state(state)
                # The whole piece, because the norm of a single row may be rounded otherwise.
                piece = unit_rows(self._normal(last - first, generator))
                found[before:until] = piece[own[0] - first : own[-1] - first + 1 : own.step]
        return found

    def _normal(self, rows: int, generator: torch.Generator) -> Tensor:
        size = rows, self.shape[1]
        return torch.randn(size, generator=generator, dtype=self.dtype, device="cpu")


def _bounds(rows: int, d: int) -> list[int]:
    """Where pieces begin and end.

    Torch draws normal numbers in groups of 16, and the last 16 once more where they do not end with
    a group. So a piece ends with a group, and the last one has at least 16 rows.
    """
    size = max(16, PIECE // d // 16 * 16)
    return [*range(0, max(1, rows - 15), size), rows]
