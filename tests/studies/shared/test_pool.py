"""Many runs: in order, in this process or others, with a progress bar, and ended at once."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from unittest.mock import Mock

import pytest
import torch

from lightning_sae.studies.shared import pool
from lightning_sae.studies.shared.pool import Report, run_all


@dataclass(frozen=True)
class Job:
    """Something to do."""

    name: str
    samples: int = 10


def work(job: Job, report: Report) -> tuple[str, int, int]:
    """Reports its samples; fails or takes a minute if its name says so."""
    if job.name == "bad":
        raise ValueError("a bad job")
    report(job.samples)
    if job.name == "slow":
        time.sleep(60)
    return job.name, os.getpid(), torch.get_num_threads()


def test_runs_in_this_process_come_in_order_with_one_thread(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    results = run_all(work, [Job(name) for name in "bca"], workers=1)
    assert results == [(name, os.getpid(), 1) for name in "bca"]
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().err
    assert "3 of 3 runs: 100%" in said
    assert "30.0/30.0" in said
    assert " activations/s" in said


def test_a_run_that_fails_ends_all_and_gives_threads_back() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="a bad job"):
        run_all(work, [Job("a"), Job("bad")], workers=1)
    assert torch.get_num_threads() == threads


@pytest.mark.filterwarnings("ignore:.*fork")
def test_processes_give_results_in_order_and_report_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked here, because a spawned process imports everything; below they are spawned."""
    context = Mock(return_value=multiprocessing.get_context("fork"))
    monkeypatch.setattr(multiprocessing, "get_context", context)
    results = run_all(work, [Job(name) for name in "bca"], workers=2)
    context.assert_called_once_with("spawn")
    assert [(name, threads) for name, _, threads in results] == [(name, 1) for name in "bca"]
    assert os.getpid() not in {process for _, process, _ in results}
    said = capsys.readouterr().err
    assert "3 of 3 runs: 100%" in said
    assert "30.0/30.0" in said


def test_ctrl_c_ends_processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    others = multiprocessing.active_children()

    def wait(*arguments: object, **_: object) -> None:
        time.sleep(0.1)
        if len(multiprocessing.active_children()) > len(others):
            raise KeyboardInterrupt

    monkeypatch.setattr(pool, "wait", wait)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(work, [Job("slow"), Job("slow")], workers=2)
    assert time.monotonic() - began < 30
    assert multiprocessing.active_children() == others
