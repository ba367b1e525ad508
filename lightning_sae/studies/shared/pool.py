"""Many training runs, several at a time, each in a process with one thread."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Result = TypeVar("Result")
Report = Callable[[int], None]
"""Takes the number of activations that were trained on since the last call."""
Work = Callable[[Any, Report], Result]
"""Does one run."""

_done: Any = None  # in a worker process: activations that all workers have trained on


def run_all(work: Work[Result], runs: Sequence[Any], workers: int | None) -> list[Result]:
    """Do all runs with a progress bar on stderr; the results are in the order of `runs`.

    If a run fails or the user presses Ctrl-C, all workers end at once. Files that finished runs
    have written stay.

    Args:
        work: Does one run; importable, since worker processes import it.
        runs: Its first arguments, each with its number of activations in `samples`.
        workers: Processes at one time, 1 for this process alone; None for one for each core.
    """
    interval = 1.0 if sys.stderr.isatty() else 30.0
    total = sum(run.samples for run in runs)
    bar = tqdm(total=total, unit=" activations", unit_scale=True, mininterval=interval)
    workers = min(workers or cores(), len(runs))
    with bar:
        if workers == 1:
            return _in_turn(work, runs, bar)
        return _in_processes(work, runs, bar, workers)


def _in_turn(work: Work[Result], runs: Sequence[Any], bar: Any) -> list[Result]:
    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)  # faster at this size, and the same sums as in a worker process
    try:
        for run in runs:
            results.append(work(run, bar.update))
            bar.set_description(f"{len(results)} of {len(runs)} runs", refresh=False)
    finally:
        torch.set_num_threads(threads)
    return results


def _in_processes(work: Work[Result], runs: Sequence[Any], bar: Any, workers: int) -> list[Result]:
    context = multiprocessing.get_context("spawn")  # forked threads of torch may hang
    done = context.Value("q", 0)
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (done,))
    try:
        waiting = futures = [pool.submit(_do, work, run) for run in runs]
        while waiting:
            wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in futures:
                if future.done():
                    future.result()  # raises if the run failed
            waiting = [future for future in futures if not future.done()]
            finished = len(runs) - len(waiting)
            bar.set_description(f"{finished} of {len(runs)} runs", refresh=False)
            bar.update(done.value - bar.n)
        return [future.result() for future in futures]
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()  # a Trainer would only note a SIGTERM
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(done: Any) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the workers
    torch.set_num_threads(1)


def _do(work: Work[Result], run: Any) -> Result:
    return work(run, _add)


def _add(samples: int) -> None:
    with _done.get_lock():
        _done.value += samples


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
