"""Train SAEs of one library on saved activations, and evaluate each on held-out ones.

`python -m benchmarks.quality_worker '{"library": ...}' RESULT`, which `benchmarks.quality` starts.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.libraries.base import OURS
from benchmarks.measure import Watch
from lightning_sae import (
    ActivationDataModule,
    BatchTopKSAE,
    CachedDataModule,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
)
from lightning_sae.callbacks import L1Warmup

EVALUATED = 1024  # activations in a batch of the evaluation
NEAR = 0.1  # relative distance to the target L0 within which it counts as reached
CLOSE, CLOSEST = 0.05, 0.02  # relative distance to the target L0 at which the search ends
ATTEMPTS, MOST_ATTEMPTS = 3, 4  # trainings of the search; the second of each if `Job.exact`
STEEPEST = 4.0  # factor by which the search changes a coefficient at most
FROM_ONE = "SAELens from norm 1"
FIRST = {"SAELens": 1.0, FROM_ONE: 1.0, "dictionary_learning": 0.1}  # the default coefficients

CLASSES: dict[str, Any] = {
    "relu": ReLUSAE,
    "gated": GatedSAE,
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "jumprelu": JumpReLUSAE,
    "matryoshka": MatryoshkaSAE,
}
SEARCHED = ("relu", "gated")
"""Architectures whose L0 follows from a coefficient in the other libraries."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    OURS: {
        "unit rows": {},
        "free rows": {"decoder_norm": "free"},
        "free rows from 0.1": {"decoder_norm": "free", "decoder_init_norm": 0.1},
    },
    "SAELens": {"norm 0.1": {}, "norm 1": {"decoder_init_norm": 1.0}},
}
"""Arguments on decoder norms that a library has, from which the best is chosen with the rate."""

PREFIXES = (16, 8, 4, 2, 1)
"""What the number of latents is divided by for the widths of nested SAEs."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        library: Which trains.
        architecture: A key of `CLASSES`.
        lr: Learning rate of the common recipe; None for the library's defaults.
        path: File of `save_activations`.
        d_sae: Number of latents.
        l0: Active latents asked for.
        batch_size: Activations in a batch.
        seed: Seed of the weights.
        coefficient: Coefficient of the penalty, where it is searched; of ours, `target_l0`.
        variant: A key of `VARIANTS`, or none.
        exact: Whether the search is for a closer L0, also by `target_l0` of ours.
    """

    library: str
    architecture: str
    lr: float | None
    path: str
    d_sae: int
    l0: int
    batch_size: int
    seed: int = 0
    coefficient: float | None = None
    variant: str = ""
    exact: bool = False

    @property
    def own(self) -> dict[str, Any]:
        """Constructor arguments that the variant sets."""
        own = VARIANTS[self.library][self.variant] if self.variant else {}
        live = own and self.library == OURS and self.architecture == "gated"
        return {**own, "auxiliary_decoder": "live"} if live else own

    @property
    def widths(self) -> list[int]:
        """Widths of nested SAEs."""
        return sorted({max(1, self.d_sae // part) for part in PREFIXES})


class Trained(NamedTuple):
    """An SAE of any library.

    Attributes:
        encode: Latents of a batch.
        decode: Their reconstruction.
        unit: Factor by which its activations differ from the saved ones.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    unit: float = 1.0


def save_activations(
    path: Path, data: ActivationDataModule, n_train: int, n_held_out: int
) -> dict[str, int]:
    """Save shuffled training and held-out activations, scaled to mean norm sqrt(d_in).

    The held-out ones follow the training ones in the stream, so that L0 of both is the same.

    Args:
        path: The new file.
        data: The stream.
        n_train: Number of training activations, rounded up to whole batches.
        n_held_out: Number of held-out activations, likewise.

    Returns:
        How many of each, and their width.
    """
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    train, held_out = (
        torch.cat([next(batches) for _ in range(math.ceil(n / data.batch_size))])
        for n in (n_train, n_held_out)
    )
    scale = math.sqrt(train.shape[1]) / train.norm(dim=1).mean()
    save_file({"train": train * scale, "held_out": held_out * scale}, path)
    return {"n_train": len(train), "n_held_out": len(held_out), "d_in": train.shape[1]}


def run(
    architectures: list[str],
    rates: list[float | None],
    seeds: int,
    variants: Sequence[str] = ("",),
    **same: Any,
) -> Iterator[dict[str, Any]]:
    """Train each architecture with the settings that are best with the first seed.

    Args:
        architectures: Keys of `CLASSES`.
        rates: Learning rates of the recipe to try, or None for the library's defaults.
        seeds: Number of seeds.
        variants: Variants of the library to try at each rate.
        same: The other arguments of `Job`.

    Yields:
        The figures of one architecture and seed.
    """
    tries = [*product(rates, variants)]
    for name in architectures:
        jobs = [Job(architecture=name, lr=rate, variant=v, **same) for rate, v in tries]
        tried = [(job, *_first(job)) for job in jobs]
        job, found, trainings = min(tried, key=lambda one: _rank(one[1], one[0].l0))
        for seed in range(seeds):
            one = replace(job, seed=seed, coefficient=found["coefficient"])
            row = {"trainings": trainings, **found} if seed == 0 else _measured(one)
            yield {**asdict(one), "tried": {_title(j): f for j, f, _ in tried}, **row}


def _title(job: Job) -> str:
    """The rate and the variant, as the page shows them."""
    rate = "None" if job.lr is None else f"{job.lr:g}"
    return f"{rate}, {job.variant}" if job.variant else rate


def _rank(row: dict[str, Any], l0: int) -> tuple[bool, float]:
    """The least is the best: L0 near the target and the least FVU, else the nearest L0."""
    near = abs(row.get("l0", math.inf) / l0 - 1) <= NEAR
    return not near, row["fvu"] if near else abs(_distance(row, l0))


def _first(job: Job) -> tuple[dict[str, Any], int]:
    """The first seed, with the coefficient that gives the closest L0; the number of trainings."""
    ours = job.library == OURS
    if not (job.exact and _is_steered(job) if ours else job.architecture in SEARCHED):
        return _measured(job), 1
    tried: list[dict[str, Any]] = []
    coefficient = job.l0 if ours else FIRST[job.library]
    attempts, close = (MOST_ATTEMPTS, CLOSEST) if job.exact else (ATTEMPTS, CLOSE)
    for _ in range(attempts):
        tried.append(_measured(replace(job, coefficient=coefficient)))
        if "error" in tried[-1] or abs(_distance(tried[-1], job.l0)) < close:
            break
        change = -_distance(tried[-1], job.l0) if ours else _change(tried, job.l0)
        coefficient *= math.exp(change)
    best = min(tried, key=lambda row: abs(_distance(row, job.l0)))
    return best, len(tried)


def _distance(row: dict[str, Any], l0: int) -> float:
    """Log of L0 over its target."""
    return math.log(max(row["l0"], 0.01) / l0) if "l0" in row else math.inf


def _change(tried: list[dict[str, Any]], l0: int) -> float:
    """Change of the log of the coefficient: by the slope of the last two trainings, at first -1."""
    slope = -1.0
    if len(tried) > 1:
        before, last = tried[-2:]
        rise = _distance(last, l0) - _distance(before, l0)
        slope = min(-0.2, rise / math.log(last["coefficient"] / before["coefficient"]))
    bound = math.log(STEEPEST)
    return max(-bound, min(bound, -_distance(tried[-1], l0) / slope))


def _measured(job: Job) -> dict[str, Any]:
    try:
        tensors = load_file(job.path)
        torch.manual_seed(job.seed)
        trained = TRAINERS[job.library](job, tensors["train"])
        return {"coefficient": job.coefficient, **evaluate(trained, tensors["held_out"])}
    except Exception as error:  # of another library, told on the page
        return {"coefficient": job.coefficient, "error": f"{type(error).__name__}: {error}"[:200]}


@torch.no_grad()
def evaluate(trained: Trained, x: Float[Tensor, "n d_in"]) -> dict[str, float]:
    """L0, fraction of variance unexplained and share of dead latents, by one formula for all."""
    error, fired = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for batch in x.split(EVALUATED):
        f = trained.encode(batch * trained.unit)
        fired = fired + (f != 0).sum(0)
        error += (trained.decode(f) / trained.unit - batch).double().square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    return {
        "l0": float(fired.sum()) / len(x),
        "fvu": float(error / variance),
        "dead": float((fired == 0).double().mean()),
    }


# How each library trains.


def _ours(job: Job, train: Float[Tensor, "n d_in"]) -> Trained:
    data = CachedDataModule(train, batch_size=job.batch_size, validation_fraction=0, seed=job.seed)
    steps = len(train) // job.batch_size
    target = job.coefficient or job.l0
    given: dict[str, Any] = {"target_l0": target} if _is_steered(job) else {"k": job.l0}
    given |= job.own
    callbacks: list[Callback] = []
    if job.lr is not None:
        given |= {"lr": job.lr, "lr_warmup_steps": 0.05, "lr_decay_steps": 0.25}
        given["dead_after"] = len(train) // 10
        if job.architecture in SEARCHED:
            callbacks = [L1Warmup(0.1)]
        if job.architecture == "matryoshka":
            given["prefixes"] = job.widths
    sae = CLASSES[job.architecture](train.shape[1], job.d_sae, **given)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(sae, data)
    sae.eval()
    return Trained(sae.encode, sae.decode)


def _is_steered(job: Job) -> bool:
    return CLASSES[job.architecture].coefficient_name is not None


def _saelens(job: Job, train: Float[Tensor, "n d_in"]) -> Trained:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    names = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
    cls, config = get_sae_training_class(names.get(job.architecture, job.architecture))
    batches = train.split(job.batch_size)
    own: dict[str, Any] = {"decoder_init_norm": 1.0} if job.library == FROM_ONE else {**job.own}
    match job.architecture:
        case "relu" | "gated":
            own["l1_coefficient"] = job.coefficient
            own["l1_warm_up_steps"] = 0 if job.lr is None else len(batches) // 10
        case "jumprelu":  # its way to ask for an L0
            own |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(job.l0)}
        case "matryoshka":
            own |= {"k": job.l0, "matryoshka_widths": job.widths}
        case _:
            own["k"] = job.l0
    schedule: dict[str, Any] = {"lr_end": 3e-5}  # a tenth of the rate, as its runner sets it
    if job.lr is not None:
        schedule = {
            "lr": job.lr,
            "lr_end": job.lr,
            "lr_warm_up_steps": len(batches) // 20,
            "lr_decay_steps": len(batches) // 4,
            "dead_feature_window": len(batches) // 10,
        }
    sae: Any = cls(config(d_in=train.shape[1], d_sae=job.d_sae, **own))
    settings = SAETrainerConfig(len(train), job.batch_size, **schedule)
    SAETrainer(settings, sae, Watch(batches, len(batches))).fit()
    sae.eval()
    return Trained(sae.encode, sae.decode)


def _dictionary_learning(job: Job, train: Float[Tensor, "n d_in"]) -> Trained:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kinds: dict[str, Any] = {
        "relu": StandardTrainer,
        "gated": GatedSAETrainer,
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "jumprelu": JumpReluTrainer,
        "matryoshka": MatryoshkaBatchTopKTrainer,
    }
    # To a mean square of 1, as its `normalize_activations` does.
    unit = 1 / float(train.square().sum(1).mean().sqrt())
    batches = (train * unit).split(job.batch_size)
    steps = len(batches)
    # Its defaults, 1000 and 2000 steps, are longer than the run, which it refuses.
    own: dict[str, Any] = {"warmup_steps": min(1000, steps // 20)}
    if job.lr is not None:
        own |= {"lr": job.lr, "decay_start": steps - steps // 4}
    if job.architecture in ("relu", "gated", "jumprelu"):
        own["sparsity_warmup_steps"] = min(2000, steps // 10)
    match job.architecture:
        case "relu" | "gated":
            own["l1_penalty"] = job.coefficient
        case "jumprelu":
            own["target_l0"] = float(job.l0)
        case "matryoshka":
            parts = [b - a for a, b in zip([0, *job.widths], job.widths, strict=False)]
            own |= {"k": job.l0, "group_fractions": [part / job.d_sae for part in parts]}
        case _:
            own["k"] = job.l0
    trainer = kinds[job.architecture](
        steps=steps,
        activation_dim=train.shape[1],
        dict_size=job.d_sae,
        layer=0,
        lm_name="",
        device="cpu",
        seed=job.seed,
        **own,
    )
    if job.lr is not None:
        trainer.dead_feature_threshold = len(train) // 10
    for step, batch in enumerate(batches):
        trainer.update(step, batch)
    ae = trainer.ae
    if job.architecture in ("batchtopk", "matryoshka"):  # per batch, as in training
        return Trained(lambda x: ae.encode(x, use_threshold=False), ae.decode, unit)
    return Trained(ae.encode, ae.decode, unit)


TRAINERS: dict[str, Callable[[Job, Tensor], Trained]] = {
    OURS: _ours,
    "SAELens": _saelens,
    FROM_ONE: _saelens,
    "dictionary_learning": _dictionary_learning,
}


def main(call: str, result: str) -> None:
    """Train as the JSON `call` describes and write the figures to the file `result`."""
    arguments = json.loads(call)
    torch.set_num_threads(arguments.pop("threads"))
    Path(result).write_text(json.dumps(list(run(**arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
