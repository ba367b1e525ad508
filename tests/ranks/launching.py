"""Processes that a launcher such as torchrun would start, as ranks of one run."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def start(
    folder: Path, commands: Sequence[Sequence[str]], **environment: str
) -> list[subprocess.Popen[bytes]]:
    """A Python process for each rank, in `folder`; what rank r says goes to `said-r` there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{folder}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(commands)),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    processes = []
    for rank, command in enumerate(commands):
        with (folder / f"said-{rank}").open("wb") as said:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=folder,
                    env={**common, "LOCAL_RANK": str(rank)},
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def finish(processes: Sequence[subprocess.Popen[bytes]], seconds: float = 300) -> list[int]:
    """Their exit statuses; none is left behind."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(folder: Path, rank: int) -> str:
    """What a rank wrote to its terminal."""
    return (folder / f"said-{rank}").read_text()
