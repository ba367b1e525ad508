"""Measure step times from outside a trainer, memory, and jobs in processes of their own."""

import contextlib
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LOOK_EVERY = 0.1  # seconds between two looks at a process's memory


class Watch(Iterator[Tensor]):
    """Serve batches to a trainer, and record when it asked for each.

    The time from one request to the next is a whole step, with everything that its trainer does
    around it. So every library is measured in the same way, without hooks into its loop.

    Args:
        batches: Batches to serve, repeated as needed.
        n_steps: Number of steps.
        budget: Seconds after which no more batches are served, once there were `at_least`.
        at_least: Steps that are made even over the budget.
        look: Called before each step with the number of steps made; its time is not counted.
        device: Where the steps are made. On a GPU, `seconds` are by its clock, without waiting.
    """

    def __init__(
        self,
        batches: Sequence[Float[Tensor, "batch d_in"]],
        n_steps: int,
        budget: float = math.inf,
        at_least: int = 1,
        look: Callable[[int], None] | None = None,
        device: str = "cpu",
    ) -> None:
        self.batches, self.device = batches, device
        self.n_steps = n_steps
        self.budget = budget
        self.at_least = at_least
        self.look = look
        self.asked: list[float] = []
        self._stamps: list[Any] = []
        self._paused = 0.0

    def __len__(self) -> int:
        """One more than `n_steps`, so that every trainer asks once more after its last step."""
        return self.n_steps + 1

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        now = self.now()
        self.asked.append(now)
        self._stamps.append(stamp(self.device) if self.device == "cuda" else now)
        made = len(self.asked) - 1
        if self.look is not None:
            self.look(made)
            self._paused += self.now() - now
        late = made >= self.at_least and now - self.asked[0] > self.budget
        if made >= self.n_steps or late:
            raise StopIteration
        return self.batches[made % len(self.batches)]

    def now(self) -> float:
        """Seconds on a clock that is paused while `look` runs."""
        return time.perf_counter() - self._paused

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [elapsed(*pair) for pair in zip(self._stamps, self._stamps[1:], strict=False)]


def stamp(device: str) -> Any:
    """The present time; on a GPU, the time at which it has done what is queued now."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(before: Any, after: Any) -> float:
    """Seconds between two stamps."""
    if isinstance(after, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1000


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


# Memory. Not `lightning_sae.bench.fits.peak_memory`: importing the package would add its memory to
# that of the library measured.


def held_bytes(device: str = "cpu") -> int:
    """Resident memory of this process, or what torch holds on a GPU, in bytes."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_bytes(device: str = "cpu") -> int:
    """The most that was held since `forget_peak`, or since the process started, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = _status("VmHWM")
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: str = "cpu") -> None:
    """Reset `peak_bytes`, if the system can (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str, process: int | str = "self") -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


# Processes.


def run_job(job: str, arguments: dict[str, Any], threads: int, **limits: float) -> dict[str, Any]:
    """Run a function of `benchmarks.worker` in a fresh process.

    Args:
        job: Its name.
        arguments: Its arguments, plain values.
        threads: Threads of torch.
        limits: `timeout` in seconds and `memory` in bytes.

    Returns:
        What the job returned, or `{"error": why it did not}`.
    """
    call = json.dumps({"job": job, "arguments": arguments, "threads": threads})
    return run_process([sys.executable, "-m", "benchmarks.worker", call], threads, **limits)


def run_process(
    command: Sequence[str], threads: int = 1, timeout: float = 600, memory: float = math.inf
) -> dict[str, Any]:
    """Run a command that writes JSON to the file named by its last argument, added here.

    It runs in an empty folder, which is removed, and is killed at its limits.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, str(result)],
                stdout=stream,
                stderr=stream,
                cwd=folder,
                env=_environment(threads),
                start_new_session=True,
            )
            try:
                reason = _wait(process, timeout, memory)
            finally:
                _end(process)
        if reason is None and result.exists():
            answer: dict[str, Any] = json.loads(result.read_text())
            return answer
        return {"error": reason or _last_line(log, process.returncode)}


def _environment(threads: int) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _wait(process: subprocess.Popen[bytes], timeout: float, memory: float) -> str | None:
    """Wait until the process ends or exceeds a limit; returns the limit it exceeded, if any."""
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_EVERY)
            return None
        if _status("VmRSS", process.pid) > memory:
            return f"more than {memory / 2**30:.3g} GiB of memory"
        if time.monotonic() > end:
            return f"more than {timeout:.0f} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
    process.wait()


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'no word'} (exit status {code})"
