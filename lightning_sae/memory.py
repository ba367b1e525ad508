"""Memory of the process."""

from pathlib import Path

import torch


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None if the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def keep_freed_blocks() -> None:
    """Let the C library keep blocks of up to 32 MiB that are freed, for those that come after.

    Linux's library gives a large block back to the system as soon as it is freed, and gets the next
    one page by page, which can take longer than what is then computed in it. What counts as large
    rises to the size of the largest such block freed so far, up to 32 MiB: so one is freed here,
    untouched. It holds no memory; other systems take no notice.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
