"""Describe the machine, the versions and the command with which figures were measured."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.libraries.base import LIBRARIES
from benchmarks.measure import ROOT

PACKAGES = ("torch", "lightning", "transformers", "transformer-lens")


def surroundings(threads: int, module: str) -> dict[str, str]:
    """Date, command (`python -m module ...`), machine and versions, as the page shows them."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "`" + shlex.join(["python", "-m", module, *_arguments()]) + "`",
        "processor": f"{_processor()}; {os.cpu_count()} cores, {threads} used",
        "memory": f"{_memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "compared": ", ".join(_versions({k: v.distribution for k, v in LIBRARIES.items()})),
        "with": ", ".join(_versions({name: name for name in PACKAGES})),
        "commit": _commit(),
    }


def _arguments() -> list[str]:
    """The arguments of the command; of an absolute path only its last part."""
    return [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _versions(distributions: dict[str, str]) -> list[str]:
    found = []
    for name, distribution in distributions.items():
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(distribution)}")
    return found


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"
