"""The sections of the benchmark, and the jobs that each of them runs."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from benchmarks.command_line import say
from benchmarks.language_model_source import Source
from benchmarks.libraries.base import LIBRARIES, OURS, Task
from benchmarks.measure import run_job

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how large.

    Attributes:
        libraries: Which, of `LIBRARIES`.
        threads: Threads of torch, in every process.
        timeout: Seconds that a process may take.
        memory_gib: GiB that a process may hold.
        budget: Seconds of steps after which no more are begun, in the sections that allow fewer.
        architectures: Those whose step is measured.
        d_in: Width of the activations whose step is measured.
        d_sae: Latents.
        batch_size: Activations in a batch.
        l0: Latents active on average, where a threshold decides.
        k: Latents active, where a number decides.
        n_warmup: Steps before the timed ones.
        n_steps: Timed steps.
        growth: Numbers of latents of the growth table.
        run_d_in: Width of the toy activations.
        run_d_sae: Latents of the whole run.
        run_steps: Its optimizer steps.
        run_lr: Its learning rate.
        run_l1: Its l1_coefficient.
        run_features: Features that the toy activations are made of.
        run_active: Features in a toy activation, on average.
        source: Where the activations of the language model come from.
        stream_refills: Refills of the buffer that the stream is measured over.
        fit_sizes: Numbers of latents of the runs on the language model.
        fit_steps: Their optimizer steps.
        sizes: Widths, numbers of latents and L0 of the section `floor`.
        precisions: Precisions of its largest size; the others are in float32.
        gpu_device: Where the steps of the section `gpu` are made; without it they are left out.
        gpu_architectures: Those whose step is measured there.
        gpu_d_in: Width of the activations there.
        gpu_sizes: Numbers of latents there.
        gpu_batch_size: Activations in a batch there.
        gpu_precisions: Precisions there.
    """

    libraries: tuple[str, ...] = tuple(LIBRARIES)
    threads: int = 2
    timeout: float = 1800
    memory_gib: float = 20
    budget: float = 60
    architectures: tuple[str, ...] = ("relu", "topk", "gated", "jumprelu", "batchtopk")
    d_in: int = 512
    d_sae: int = 8192
    batch_size: int = 2048
    l0: int = 64
    k: int = 32
    n_warmup: int = 5
    n_steps: int = 20
    growth: tuple[int, ...] = (2048, 8192, 32768, 131072)
    run_d_in: int = 256
    run_d_sae: int = 2048
    run_steps: int = 600
    run_lr: float = 1e-3
    run_l1: float = 0.3
    run_features: int = 1024
    run_active: float = 16
    source: dict[str, Any] = field(default_factory=Source()._asdict)
    stream_refills: int = 6
    fit_sizes: tuple[int, ...] = (1024, 8192)
    fit_steps: int = 500
    sizes: tuple[tuple[int, int, int], ...] = ((128, 1024, 20), (128, 1024, 64), (512, 8192, 64))
    precisions: tuple[str, ...] = ("32-true", "bf16-mixed")
    gpu_device: str = "cuda"
    gpu_architectures: tuple[str, ...] = ("relu", "gated", "topk", "batchtopk")
    gpu_d_in: int = 2304
    gpu_sizes: tuple[int, ...] = (16384, 131072)
    gpu_batch_size: int = 4096
    gpu_precisions: tuple[str, ...] = ("bf16-mixed", "32-true")

    def measured(self, job: str, arguments: Row, label: Row) -> Row:
        """Run a job in a process of its own; returns its answer together with `label`."""
        say(f"{job}: {' '.join(str(value) for value in label.values() if value != '')}")
        limits = {"timeout": self.timeout, "memory": self.memory_gib * 2**30}
        answer = run_job(job, arguments, self.threads, **limits)
        say(f"    {outline(answer)}")
        return label | answer

    def contenders(self, architecture: str) -> Iterator[tuple[str, str]]:
        """Libraries that have the architecture, each with its variants."""
        for name in self.libraries:
            if architecture in LIBRARIES[name].architectures:
                for variant in LIBRARIES[name].variants.get(architecture, ("",)):
                    yield name, variant

    def step(
        self,
        library: str,
        variant: str,
        architecture: str,
        d_sae: int,
        budget: float,
        precision: str = "32-true",
        device: str = "cpu",
    ) -> Row:
        """Measure a step of one contender."""
        task = Task(
            architecture,
            self.d_in,
            d_sae,
            self.batch_size,
            self.n_warmup + self.n_steps,
            self.l0,
            self.k,
            variant=variant,
            device=device,
            precision=precision,
        )
        arguments = {
            "library": library,
            "task": asdict(task),
            "warmup": self.n_warmup,
            "budget": budget,
            "at_least": min(3, self.n_steps),
        }
        label = {
            "library": library,
            "variant": variant,
            "architecture": architecture,
            "d_sae": d_sae,
            "precision": precision,
        }
        return self.measured("step", arguments, label)

    def floor(self, d_sae: int, precision: str = "32-true", device: str = "cpu") -> Row:
        """Measure the least that any step must do."""
        arguments = {
            "d_in": self.d_in,
            "d_sae": d_sae,
            "batch_size": self.batch_size,
            "n_steps": self.n_steps,
            "warmup": self.n_warmup,
            "device": device,
            "precision": precision,
        }
        return self.measured("floor", arguments, {"d_sae": d_sae, "precision": precision})


def steps(plan: Plan) -> Row:
    """Time one optimizer step of every architecture and library, without a budget."""
    rows = [
        plan.step(library, variant, architecture, plan.d_sae, budget=plan.timeout)
        for architecture in plan.architectures
        for library, variant in plan.contenders(architecture)
    ]
    return {"floors": [plan.floor(plan.d_sae)], "rows": rows}


def growth(plan: Plan) -> Row:
    """Time a step at several numbers of latents; slow contenders make fewer steps."""
    rows = [
        plan.step(library, variant, architecture, d_sae, plan.budget)
        for architecture in ("relu", "topk")
        for d_sae in plan.growth
        for library, variant in plan.contenders(architecture)
    ]
    return {"floors": [plan.floor(d_sae) for d_sae in plan.growth], "rows": rows}


def run(plan: Plan) -> Row:
    """Measure a whole training run: ours, ours with dense latents, and the peers."""
    task = Task(
        "relu",
        plan.run_d_in,
        plan.run_d_sae,
        plan.batch_size,
        plan.run_steps,
        lr=plan.run_lr,
        l1_coefficient=plan.run_l1,
    )
    arguments = {
        "n_features": plan.run_features,
        "n_active": plan.run_active,
        "n_batches": min(64, plan.run_steps),
        "look_every": max(1, plan.run_steps // 40),
        "budget": plan.timeout,
    }
    contenders = list(plan.contenders("relu"))
    if OURS in plan.libraries:
        contenders.insert(1, (OURS, "dense"))
    rows = [
        plan.measured(
            "run",
            {"library": name, "task": asdict(task) | {"variant": variant}, **arguments},
            {"library": name, "variant": variant},
        )
        for name, variant in contenders
    ]
    return {"rows": rows}


def stream(plan: Plan) -> Row:
    """Measure our activation stream, and the bare model to compare it with."""
    arguments = {"source": plan.source, "n_refills": plan.stream_refills}
    bare = plan.measured("plain", arguments, {"what": "the bare model"})
    rows = [
        plan.measured(
            "stream",
            {"prefetch": prefetch, **arguments},
            {"what": f"the stream, {'with' if prefetch else 'without'} prefetch"},
        )
        for prefetch in (True, False)
    ]
    return {"rows": [bare, *rows]}


def fit(plan: Plan) -> Row:
    """Measure whole runs on a language model, ours and SAELens'."""
    contenders = ((OURS, ""), ("SAELens", ""), ("SAELens", "defaults"))
    arguments = {"source": plan.source, "n_steps": plan.fit_steps}
    rows = [
        plan.measured(
            "fit",
            {"library": name, "d_sae": d_sae, "variant": variant, **arguments},
            {"library": name, "variant": variant, "d_sae": d_sae},
        )
        for d_sae in plan.fit_sizes
        for name, variant in contenders
        if name in plan.libraries
    ]
    return {"rows": rows}


def floor(plan: Plan) -> Row:
    """Time our steps beside the least that they must do, for small and large dictionaries."""
    cases = [(size, "32-true") for size in plan.sizes]
    cases += [(plan.sizes[-1], name) for name in plan.precisions if name != "32-true"]
    rows, floors = [], []
    for (d_in, d_sae, l0), precision in cases:
        there = replace(plan, d_in=d_in, l0=l0, k=l0)
        size = {"d_in": d_in, "l0_asked": l0}
        floors.append(size | there.floor(d_sae, precision))
        for architecture in plan.architectures if OURS in plan.libraries else ():
            step = there.step(OURS, "", architecture, d_sae, plan.budget, precision)
            rows.append(size | step)
    return {"floors": floors, "rows": rows}


def gpu(plan: Plan) -> Row:
    """Time one optimizer step on a GPU, if there is one: large dictionaries, two precisions."""
    if plan.gpu_device == "cuda" and not torch.cuda.is_available():
        return {"card": None, "floors": [], "rows": []}
    there = replace(plan, d_in=plan.gpu_d_in, batch_size=plan.gpu_batch_size)
    cases = list(product(plan.gpu_sizes, plan.gpu_precisions))
    rows = [
        there.step(library, variant, architecture, d_sae, plan.budget, precision, plan.gpu_device)
        for d_sae, precision in cases
        for architecture in plan.gpu_architectures
        for library, variant in plan.contenders(architecture)
    ]
    floors = [there.floor(*case, plan.gpu_device) for case in cases]
    on_card = plan.gpu_device == "cuda"
    card = torch.cuda.get_device_name() if on_card else plan.gpu_device
    return {"card": card, "floors": floors, "rows": rows}


SECTIONS: dict[str, Callable[[Plan], Row]] = {
    "steps": steps,
    "growth": growth,
    "run": run,
    "stream": stream,
    "fit": fit,
    "floor": floor,
    "gpu": gpu,
}


def outline(answer: Row) -> str:
    """A short summary of what a job returned."""
    if "error" in answer:
        return f"failed: {answer['error']}"
    if "rate" in answer:
        return f"{answer['rate']:,.0f} activations/s"
    if "wall" in answer:
        return f"{answer['wall']:.1f} s, loss {answer['loss']:.4g}"
    return f"{1000 * answer['seconds']['median']:.1f} ms"
