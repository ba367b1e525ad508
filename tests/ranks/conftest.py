"""Two processes that do all that needs two ranks, once for all tests."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.ranks.cases import to_analyze
from tests.ranks.command import kill, write_config
from tests.ranks.launching import finish, said, start
from tests.ranks.split_cases import toy_run

MARK = "<|endoftext|>"


class OfRanks(NamedTuple):
    """What the two processes left."""

    folder: Path
    results: list[dict[str, Any]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text whose documents are long and short in turn."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = Path(json.__file__).with_name("decoder.py").read_text().splitlines()
    documents, first = [], 0
    for number in range(30):
        length = 4 if number % 2 else 12
        documents.append("\n".join(lines[first : first + length]))
        first += length
    (folder / "text.txt").write_text(MARK.join(documents))
    return folder


@pytest.fixture(scope="session")
def killed(folder: Path) -> list[int]:
    """Exit statuses of a run whose second rank was killed in its sixth step."""
    config = write_config(folder / "killed", more=kill(rank=1, step=5))
    command = ["-m", "lightning_sae", "fit", "--config", str(config)]
    statuses = finish(start(folder, [command, command]))
    for rank in range(2):
        shutil.copy(folder / f"said-{rank}", folder / f"killed-said-{rank}")
    write_config(folder / "killed")  # nobody is killed when it goes on
    return statuses


@pytest.fixture(scope="session")
def of_ranks(folder: Path, killed: list[int]) -> OfRanks:
    """What each of two ranks found."""
    bare = folder / "bare" / "checkpoints"
    bare.mkdir(parents=True)
    shutil.copy(folder / "killed" / "checkpoints" / "last.ckpt", bare)
    shutil.copytree(folder / "killed", folder / "alone")
    write_config(folder / "whole")
    write_config(folder / "bare")
    write_config(folder / "different")
    to_analyze(folder)
    command = ["-m", "tests.ranks.worker", str(folder)]
    statuses = finish(start(folder, [command, command]))
    assert statuses == [0, 0], said(folder, 0) + said(folder, 1)
    return OfRanks(folder, [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)])


class OfParts(NamedTuple):
    """What the ranks of a split dictionary left: two that hold it together, and then four."""

    folder: Path
    two: list[dict[str, Any]]
    four: list[dict[str, Any]]


@pytest.fixture(scope="session")
def of_parts(folder: Path) -> OfParts:
    """What they found."""
    at = folder / "split"
    at.mkdir()
    shutil.copy(folder / "text.txt", at)
    toy_run(at / "toy" / "one", 4)
    write_config(at / "two", strategy="SplitDictionary")
    statuses = finish(start(at, [["-m", "tests.ranks.split_worker", str(at)]]))
    assert statuses == [0], said(at, 0)
    two, four = (
        [torch.load(at / f"of_{name}-{rank}.pt") for rank in range(n)]
        for name, n in (("two", 2), ("four", 4))
    )
    return OfParts(at, two, four)
