"""Progress messages of long steps."""

import time
from collections.abc import Callable

EVERY = 15.0
"""Seconds between two messages; a shorter step gives none."""


def say_nothing(text: str) -> None:
    """Ignore progress messages."""


class Progress:
    """Says from time to time which share of a step is done.

    Args:
        say: Called with the messages.
        step: What is done.
        total: Its size, in any unit.
    """

    def __init__(self, say: Callable[[str], None], step: str, total: int) -> None:
        self.say, self.step, self.total, self.done = say, step, max(total, 1), 0
        self._said_at = time.monotonic()

    def add(self, n: int = 1) -> None:
        """Count `n` more as done."""
        self.done += n
        if time.monotonic() - self._said_at >= EVERY:
            self._said_at = time.monotonic()
            self.say(f"{self.step}: {min(self.done / self.total, 1):.0%}")
