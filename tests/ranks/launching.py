"""Ranks of one run, as a launcher such as torchrun starts them, but forked from a process that has
imported everything: that takes longer than what most of them do.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Work = Callable[[int, Path], dict[str, Any] | None]
"""What a rank does, and returns, in a folder."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks.worker", "tests.ranks.split_worker"])


def launch(folder: Path, work: Work, n: int = 2, seconds: float = 300) -> list[int | None]:
    """Exit statuses of n ranks; none is left behind.

    What rank r says goes to `said-r` in `folder`, and what it returns to `r.pt` named after `work`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n),
        "NODE_RANK": "0",
    }
    ranks = [
        CONTEXT.Process(target=_be, args=(rank, work, folder, environment)) for rank in range(n)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(seconds)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def results(folder: Path, work: Work, n: int = 2) -> list[dict[str, Any]]:
    """What n ranks return, all of which have to end well."""
    statuses = launch(folder, work, n)
    assert statuses == [0] * n, "\n".join(said(folder, rank) for rank in range(n))
    return [torch.load(folder / f"{work.__name__}-{rank}.pt") for rank in range(n)]


def _be(rank: int, work: Work, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment, LOCAL_RANK=str(rank))
    os.chdir(folder)
    with (folder / f"said-{rank}").open("wb") as terminal:
        for stream in (1, 2):
            os.dup2(terminal.fileno(), stream)
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{work.__name__}-{rank}.pt")


def said(folder: Path, rank: int) -> str:
    """What a rank wrote to its terminal."""
    return (folder / f"said-{rank}").read_text()
