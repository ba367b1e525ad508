"""Many runs, several at a time, each in a process with one thread."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
Work = Callable[[Any, Callable[[int], None]], Result]
"""Does one run and tells how many activations more it was through with."""

_done: Any = None  # activations done by all processes; each process has its own name for it


class ProgressLine:
    """Says how far all runs are, how fast they go and how long it will take.

    On a terminal it is one line, renewed each second; elsewhere a line each half a minute.

    Args:
        total: Activations of all runs.
        n_runs: Number of runs.
    """

    def __init__(self, total: int, n_runs: int) -> None:
        self.total, self.n_runs = total, n_runs
        self.done, self.finished = 0, 0
        self.began = self.said = time.perf_counter()
        self.interval = 1.0 if sys.stderr.isatty() else 30.0

    def add(self, samples: int) -> None:
        """Note that so many more were trained on."""
        self.at(self.done + samples)

    def at(self, done: int) -> None:
        """Note how many were trained on, and say so if it is time."""
        self.done = done
        if time.perf_counter() - self.said >= self.interval:
            self.say()

    def say(self) -> None:
        """Say it."""
        self.said = time.perf_counter()
        passed = self.said - self.began
        left = _clock(max(0.0, passed * (self.total / self.done - 1))) if self.done else "?"
        text = (
            f"{self.finished} of {self.n_runs} runs; {self.done / 1e6:,.0f} of "
            f"{self.total / 1e6:,.0f} million activations; {self.done / passed:,.0f}/s; "
            f"{_clock(passed)} passed, {left} left"
        )
        sys.stderr.write(f"\r\x1b[K{text}" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line behind."""
        self.say()
        if sys.stderr.isatty():
            sys.stderr.write("\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def run_all(
    work: Work[Result], runs: Sequence[Any], line: ProgressLine, workers: int
) -> list[Result]:
    """Do all runs; results in their order, whatever the number of processes.

    Args:
        work: What to do; importable, as processes are started anew.
        runs: What to do it on, each with a size in `samples`.
        line: Where it is said how far it is.
        workers: Processes at one time; 1 for none but this one.
    """
    if workers == 1:
        results = _in_turn(work, runs, line)
    else:
        results = _in_processes(work, runs, line, workers)
    line.end()
    return results


def _in_turn(work: Work[Result], runs: Sequence[Any], line: ProgressLine) -> list[Result]:
    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)  # faster at this size, and the same sums as in a process of its own
    try:
        for run in runs:
            results.append(work(run, line.add))
            line.finished += 1
    finally:
        torch.set_num_threads(threads)
    return results


def _in_processes(
    work: Work[Result], runs: Sequence[Any], line: ProgressLine, workers: int
) -> list[Result]:
    context = multiprocessing.get_context("spawn")  # forked threads of torch may hang
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(workers, len(runs)), context, _begin, (done,))
    try:
        futures: list[Future[Result]] = [pool.submit(_do, work, run) for run in runs]
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()  # a run that failed ends them all
            line.finished += len(ended)
            line.at(done.value)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(done: Any) -> None:
    global _done
    _done = done
    torch.set_num_threads(1)


def _do(work: Work[Result], run: Any) -> Result:
    return work(run, _add)


def _add(samples: int) -> None:
    with _done.get_lock():
        _done.value += samples


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
