"""Which latents are dead, without waiting for a GPU where none can be."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class Silence:
    """Counts for how long each latent is silent, and finds the dead ones.

    If the latent that is silent for longest is so for m activations, none is dead before another
    `dead_after - m`. Until then the counts need not be read. They are read again if something else,
    such as a callback or a checkpoint, has changed them.
    """

    def __init__(self) -> None:
        self._of: tuple[Tensor, int] | None = None  # the counts, and torch's version of them
        self._dead_after = 0
        self._none_for = 0  # activations
        self._found: Tensor | None = None

    def count(
        self, silent_for: Int[Tensor, " d_sae"], fired: Int[Tensor, " d_sae"], n: int
    ) -> None:
        """Update the counts in place with how often each latent fired on n activations."""
        known = self._knows(silent_for)
        silent_for += n
        silent_for.masked_fill_(fired > 0, 0)
        if known:
            self._of = silent_for, silent_for._version
            self._none_for -= n
            self._found = None

    def dead(self, silent_for: Int[Tensor, " d_sae"], dead_after: int) -> Int[Tensor, " n_dead"]:
        """Indices of the latents that are silent for at least `dead_after` activations."""
        if not self._knows(silent_for) or dead_after != self._dead_after:
            self._of, self._dead_after = (silent_for, silent_for._version), dead_after
            self._none_for, self._found = 0, None
        if self._found is None:
            self._found = self._look(silent_for, dead_after)
        return self._found

    def _look(self, silent_for: Tensor, dead_after: int) -> Tensor:
        if self._none_for > 0:
            return torch.empty(0, dtype=torch.int64, device=silent_for.device)
        found = (silent_for >= dead_after).nonzero().squeeze(-1)
        if len(found) == 0:
            self._none_for = dead_after - int(silent_for.max())
        return found

    def _knows(self, silent_for: Tensor) -> bool:
        return (
            self._of is not None
            and self._of[0] is silent_for
            and (self._of[1] == silent_for._version)
        )

    def __getstate__(self) -> dict[str, Any]:
        return Silence().__dict__  # a copy looks again
