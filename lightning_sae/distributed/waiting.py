"""A word to the user when processes do not find each other."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

log = logging.getLogger("lightning.pytorch")

PATIENCE = 60.0  # seconds


@contextmanager
def told_of_waiting(timeout: object) -> Iterator[None]:
    """Log once if this block, in which the processes of a run meet, takes more than a minute.

    A process that was killed before is waited for until the timeout. Launchers such as Lightning's
    and torchrun end the others then, but not if the launcher itself was killed, or if the processes
    were started by hand.

    Args:
        timeout: After which torch raises an error.
    """
    message = (
        f"This process has waited {PATIENCE:g} s for the others of the run, and does so for "
        f"{timeout} (hours:minutes:seconds): if one of them has ended, end this one too."
    )
    timer = Timer(PATIENCE, log.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
