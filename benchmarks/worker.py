"""Run one job of the benchmark in this process and write its figures as JSON.

`python -m benchmarks.worker '{"job": ..., "arguments": ..., "threads": ...}' RESULT`, which
`benchmarks.measure.run_job` starts.
"""

import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import language_model_jobs
from benchmarks.libraries.base import LIBRARIES, Contender, Task, calibrate
from benchmarks.measure import (
    Watch,
    elapsed,
    forget_peak,
    held_bytes,
    peak_bytes,
    spread,
    stamp,
)
from benchmarks.synthetic_batches import gaussian_batches, sparse_batches


def step(
    library: str, task: dict[str, Any], warmup: int, budget: float, at_least: int
) -> dict[str, Any]:
    """Measure time and memory of whole optimizer steps, with the L0 set before training.

    Args:
        library: A key of `LIBRARIES`.
        task: Arguments of `Task`; the first `warmup` of its steps are not timed.
        warmup: Steps before the timed ones.
        budget: Seconds after which no new step is started.
        at_least: Timed steps that are made even over the budget.

    Returns:
        `seconds` of a step (median and quartiles), the number of them, the L0 seen, and
        `peak_bytes` above what was held before the SAE was built, on the task's device.
    """
    asked, trained = Task(**task), LIBRARIES[library].load()
    _rehearse(trained, asked)
    made = gaussian_batches(8, asked.batch_size, asked.d_in)
    batches = [batch.to(asked.device) for batch in made]
    before = held_bytes(asked.device)
    contender = trained(asked)
    rows = torch.cat([batch[:64] for batch in batches])
    calibrate(contender, asked, rows)
    forget_peak(asked.device)
    watch = Watch(batches, asked.n_steps, budget, warmup + at_least, device=asked.device)
    contender.train(watch)
    peak = peak_bytes(asked.device) - before
    seconds = watch.seconds[warmup:]
    with torch.no_grad():
        l0 = contender.l0(rows)
    return {
        "seconds": spread(seconds),
        "n_timed": len(seconds),
        "l0": l0,
        "peak_bytes": peak,
        "note": contender.note(),
    }


def floor(
    d_in: int,
    d_sae: int,
    batch_size: int,
    n_steps: int,
    warmup: int,
    device: str = "cpu",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Measure the least that any step must do: the encoder's product and one pass of Adam.

    The product is written to memory allocated before. Adam is torch's fused one, on an encoder and
    a decoder that already have gradients. The encoder is tried in both memory orders; the faster
    one counts.
    """
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    x = gaussian_batches(1, batch_size, d_in)[0].to(device, dtype)
    pre = torch.empty(batch_size, d_sae, device=device, dtype=dtype)
    found = []
    for weights in (torch.randn(d_sae, d_in).T, torch.randn(d_in, d_sae)):
        weights, others = weights.to(device), torch.randn(d_sae, d_in, device=device)
        adam = _adam([weights.T if weights.T.is_contiguous() else weights, others])
        W_enc = weights.to(dtype)
        stamps = []
        for _ in range(warmup + n_steps):
            began = stamp(device)
            torch.mm(x, W_enc, out=pre)
            between = stamp(device)
            adam.step()
            stamps.append((began, between, stamp(device)))
        parts = [(elapsed(a, b), elapsed(b, c)) for a, b, c in stamps]
        product, update = (spread(part) for part in zip(*parts[warmup:], strict=True))
        both = spread([sum(pair) for pair in parts[warmup:]])
        found.append({"product": product, "adam": update, "seconds": both, "n_timed": n_steps})
    return min(found, key=lambda one: one["seconds"]["median"])


def _adam(weights: Sequence[Tensor]) -> torch.optim.Adam:
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return torch.optim.Adam(parameters, lr=1e-9, fused=True)


def run(
    library: str,
    task: dict[str, Any],
    n_features: int,
    n_active: float,
    n_batches: int,
    look_every: int,
    budget: float,
) -> dict[str, Any]:
    """Measure a whole training run on activations with known features.

    Args:
        library: A key of `LIBRARIES`.
        task: Arguments of `Task`.
        n_features: Features that the activations are made of.
        n_active: Features in an activation, on average.
        n_batches: Number of different batches, which are repeated.
        look_every: Steps between two evaluations on held-out rows, whose time is not counted.
        budget: Seconds after which no new step is started.

    Returns:
        `wall` seconds, the quality on held-out rows at the end and, in `looks`, during the run.
    """
    asked, trained = Task(**task), LIBRARIES[library].load()
    _rehearse(trained, asked)
    *batches, first, second = sparse_batches(
        n_batches + 2, asked.batch_size, asked.d_in, n_features, n_active
    )
    held_out = torch.cat([first, second])
    contender = trained(asked)
    looks: list[dict[str, float]] = []
    notes: list[str] = []

    def look(made: int) -> None:
        notes.append(contender.note())
        if made % look_every == 0 or made == asked.n_steps:
            seconds = watch.asked[-1] - began
            found = quality(contender, held_out, asked.l1_coefficient)
            looks.append({"step": made, "seconds": seconds, **found})

    watch = Watch(batches, asked.n_steps, budget, look=look)
    began = watch.now()
    contender.train(watch)
    return {
        "wall": watch.now() - began,
        "steps": len(watch.seconds),
        "dense_steps": notes.count("dense"),
        "looks": looks,
        **quality(contender, held_out, asked.l1_coefficient),
    }


@torch.no_grad()
def quality(
    contender: Contender, x: Float[Tensor, "batch d_in"], l1_coefficient: float
) -> dict[str, float]:
    """Loss, L0 and fraction of variance unexplained, by the same formula for every library.

    The penalty weights latents by their decoder norms, which has no effect on unit norms.
    """
    f = contender.latents(x)
    error = (contender.decode(f) - x).pow(2).sum(-1).mean()
    penalty = (f * contender.W_dec.norm(dim=-1)).sum(-1).mean()
    return {
        "loss": (error + l1_coefficient * penalty).item(),
        "l0": f.count_nonzero().item() / len(x),
        "fvu": (error / (x - x.mean(0)).pow(2).sum(-1).mean()).item(),
    }


def _rehearse(trained: type[Contender], task: Task) -> None:
    """Train a tiny SAE first, so that late imports and set-up are not measured."""
    tiny = replace(task, d_in=16, d_sae=64, batch_size=32, n_steps=2, l0=4, k=4)
    contender = trained(tiny)
    batches = [b.to(task.device) for b in gaussian_batches(1, tiny.batch_size, tiny.d_in)]
    contender.train(Watch(batches, tiny.n_steps))
    del contender
    gc.collect()


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": step,
    "floor": floor,
    "run": run,
    "plain": language_model_jobs.plain,
    "stream": language_model_jobs.stream,
    "fit": language_model_jobs.fit,
}


def main(call: str, result: str) -> None:
    """Run the job described by the JSON `call` and write its answer to the file `result`."""
    asked = json.loads(call)
    torch.set_num_threads(asked["threads"])
    answer = JOBS[asked["job"]](**asked["arguments"])
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
