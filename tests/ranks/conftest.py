"""Processes that do all that needs two ranks or four, once for all tests."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ranks.cases import to_analyze
from tests.ranks.command import kill, write_config
from tests.ranks.launching import launch, results
from tests.ranks.split_cases import STREAMED, toy_run
from tests.ranks.split_worker import of_four, of_two
from tests.ranks.worker import fit_killed, of_rank

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
def killed(folder: Path) -> list[int | None]:
    """Exit statuses of a run whose second rank was killed in its sixth step."""
    write_config(folder / "killed", more=kill(rank=1, step=5))
    statuses = launch(folder, fit_killed)
    for rank in range(2):
        shutil.copy(folder / f"said-{rank}", folder / f"killed-said-{rank}")
    write_config(folder / "killed")  # nobody is killed when it goes on
    return statuses


@pytest.fixture(scope="session")
def of_ranks(folder: Path, killed: list[int | None]) -> OfRanks:
    """What each of two ranks found."""
    bare = folder / "bare" / "checkpoints"
    bare.mkdir(parents=True)
    shutil.copy(folder / "killed" / "checkpoints" / "last.ckpt", bare)
    shutil.copytree(folder / "killed", folder / "alone")
    write_config(folder / "whole")
    write_config(folder / "bare")
    write_config(folder / "different")
    to_analyze(folder)
    return OfRanks(folder, results(folder, of_rank))


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
    for name in STREAMED:
        toy_run(at / name / "one", 4)
    write_config(at / "two", strategy="SplitDictionary")
    return OfParts(at, results(at, of_two), results(at, of_four, 4))
