"""Many runs: in order, in this process or others, with a line that says how far they are."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from lightning_sae.studies.shared.pool import ProgressLine, run_all


@dataclass(frozen=True)
class Job:
    """Something to do."""

    name: str
    samples: int = 10


def work(job: Job, report: Callable[[int], None]) -> tuple[str, int, int]:
    """Does nothing but tell so."""
    if job.name == "bad":
        raise ValueError("a bad job")
    report(job.samples)
    return job.name, os.getpid(), torch.get_num_threads()


def test_runs_in_this_process_come_in_order_with_one_thread() -> None:
    threads = torch.get_num_threads()
    line = ProgressLine(30, 3)
    results = run_all(work, [Job(name) for name in "bca"], line, workers=1)
    assert results == [(name, os.getpid(), 1) for name in "bca"]
    assert (line.done, line.finished) == (30, 3)
    assert torch.get_num_threads() == threads


def test_a_run_that_fails_ends_all_and_gives_threads_back() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="a bad job"):
        run_all(work, [Job("a"), Job("bad")], ProgressLine(20, 2), workers=1)
    assert torch.get_num_threads() == threads


def test_nothing_is_foretold_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(10, 1).end()
    assert capsys.readouterr().err.endswith("0:00 passed, ? left\n")


def test_processes_give_results_in_order_and_say_how_far_they_are() -> None:
    line = ProgressLine(30, 3)
    results = run_all(work, [Job(name) for name in "bca"], line, workers=2)
    assert [(name, threads) for name, _, threads in results] == [(name, 1) for name in "bca"]
    assert os.getpid() not in {process for _, process, _ in results}
    assert (line.done, line.finished) == (30, 3)


def test_the_line_gives_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(4_000_000, 2)
    line.began -= 30
    line.add(1_000_000)
    line.finished = 1
    assert capsys.readouterr().err == ""  # not yet time
    line.said -= 30
    line.add(1_000_000)
    said = capsys.readouterr().err
    assert said.startswith("1 of 2 runs; 2 of 4 million activations; 66,6")
    assert said.endswith("/s; 0:30 passed, 0:30 left\n")
