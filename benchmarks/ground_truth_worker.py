"""Train and evaluate one SAE on saved activations whose features are known.

`python -m benchmarks.ground_truth_worker '{"library": ...}' RESULT`, which
`benchmarks.ground_truth` starts for each library, architecture and seed.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.libraries.base import OURS
from benchmarks.measure import Watch
from lightning_sae.studies.ground_truth.measure import held_out, measure
from lightning_sae.studies.ground_truth.settings import ARCHITECTURES, RECIPE, World
from lightning_sae.studies.ground_truth.train import ArchitectureRun
from lightning_sae.studies.shared.toy_training import quiet

EVALUATED = 1024  # activations in a batch of the evaluation, as in SAELens' runner
THEIRS = {
    "relu": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
}
"""SAELens' names of the architectures that both libraries have, by ours."""


def save_activations(path: Path, world: World, seed: int, samples: int) -> None:
    """Draw training and held-out activations and save them, scaled to mean norm sqrt(d_in).

    The number of training activations is rounded up to whole batches.
    """
    data = world.data(seed)
    samples = math.ceil(samples / RECIPE["batch_size"]) * int(RECIPE["batch_size"])
    scaling = data.scaling()
    assert scaling is not None
    generator = torch.Generator().manual_seed(seed)
    train = [data.sample(n, generator).x for n in _chunks(samples)]
    x, magnitudes = (torch.cat(parts) for parts in zip(*held_out(data), strict=True))
    tensors = {
        "train": torch.cat(train) * scaling.scale,
        "x": x * scaling.scale,
        "magnitudes": magnitudes * scaling.scale,
        "features": data.features,
        "pairs": torch.tensor(data.pairs),
    }
    save_file(tensors, path)


def _chunks(n: int, size: int = 65_536) -> Iterator[int]:
    for first in range(0, n, size):
        yield min(size, n - first)


def train_and_evaluate(
    library: str,
    architecture: str,
    path: str,
    l0: int,
    seed: int,
    d_sae: int,
    coefficient: float | None,
) -> dict[str, Any]:
    """Train on the saved activations and evaluate on the held-out ones with both libraries.

    Args:
        library: `lightning-sae` or `SAELens`, which trains.
        architecture: A key of `ARCHITECTURES`.
        path: File that `save_activations` wrote.
        l0: Target number of active latents.
        seed: Seed of the weights.
        d_sae: Number of latents.
        coefficient: Coefficient of SAELens' penalty; ours is found by `TargetL0`.

    Returns:
        CPU `seconds` of training, the penalty's `coefficient`, and the metrics as computed by
        lightning-sae (`ours`) and by SAELens (`theirs`).
    """
    tensors = load_file(path)
    train, features = tensors["train"], tensors["features"]
    world = World(*features.shape)
    run = ArchitectureRun(architecture, l0, seed, world, d_sae, len(train))
    batches = train.split(int(RECIPE["batch_size"]))
    trained = _ours if library == OURS else _theirs
    # A first step that is not timed, so that late imports and set-up are not measured.
    trained(replace(run, samples=len(batches[0])), Watch(batches, 1), coefficient)
    torch.manual_seed(seed)
    began = process_time()  # not wall time, which other work on the machine lengthens
    sae, coefficient = trained(run, Watch(batches, len(batches)), coefficient)
    seconds = process_time() - began
    x, magnitudes = tensors["x"].split(EVALUATED), tensors["magnitudes"].split(EVALUATED)
    pairs = [(parent, child) for parent, child in tensors["pairs"].tolist()]
    return {
        "seconds": seconds,
        "coefficient": coefficient,
        "ours": measure(sae.eval(), zip(x, magnitudes, strict=True), features, pairs),
        "theirs": _by_saelens(sae, features, tensors["magnitudes"]),
    }


def _ours(run: ArchitectureRun, watch: Watch, _: float | None) -> tuple[Any, float | None]:
    sae = run.sae()
    with quiet():
        trainer = Trainer(
            accelerator="cpu", barebones=True, max_steps=run.steps, callbacks=run.callbacks()
        )
        trainer.fit(sae, watch)
    return sae, None if sae.coefficient_name is None else sae.weight_of_penalty()


def _theirs(
    run: ArchitectureRun, watch: Watch, coefficient: float | None
) -> tuple[Any, float | None]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    cls, config = get_sae_training_class(THEIRS[run.architecture])
    sae = cls(config(d_in=run.world.d_in, d_sae=run.d_sae, **_settings(run, coefficient)))
    batch_size = int(RECIPE["batch_size"])
    trained = SAETrainerConfig(
        run.steps * batch_size,
        batch_size,
        lr=RECIPE["lr"],
        lr_end=RECIPE["lr"],
        lr_warm_up_steps=run.share("lr_warmup"),
        lr_decay_steps=run.share("lr_decay"),
        dead_feature_window=max(1, run.share("dead_after")),
    )
    SAETrainer(trained, sae, watch).fit()
    return sae, coefficient


def _settings(run: ArchitectureRun, coefficient: float | None) -> dict[str, Any]:
    warmup = max(1, run.share("penalty_warmup"))
    own = ARCHITECTURES[run.architecture].settings
    match run.architecture:
        case "relu" | "gated":
            return {"l1_coefficient": coefficient, "l1_warm_up_steps": warmup}
        case "jumprelu":
            return {
                "l0_coefficient": coefficient,
                "l0_warm_up_steps": warmup,
                "jumprelu_bandwidth": own["bandwidth"],
                "jumprelu_init_threshold": own["threshold_init"],
            }
        case "matryoshka":
            return {"k": run.l0, "matryoshka_widths": list(run.prefixes)}
    return {"k": run.l0}


class _Directions(nn.Module):
    """The known features, in place of SAELens' `FeatureDictionary`."""

    def __init__(self, features: Float[Tensor, "n_features d_in"]) -> None:
        super().__init__()
        self.feature_vectors = features

    def forward(self, magnitudes: Float[Tensor, "n n_features"]) -> Float[Tensor, "n d_in"]:
        return magnitudes @ self.feature_vectors


class _Replay:
    """The saved magnitudes in order, in place of SAELens' activation generator."""

    def __init__(self, magnitudes: Float[Tensor, "n n_features"]) -> None:
        self.magnitudes, self.place = magnitudes, 0

    def sample(self, n: int) -> Float[Tensor, "n n_features"]:
        """The next `n` magnitudes."""
        self.place += n
        return self.magnitudes[self.place - n : self.place]


def _by_saelens(sae: Any, features: Tensor, magnitudes: Tensor) -> dict[str, Any]:
    """SAELens' metrics of an SAE on the saved held-out samples."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    found = eval_sae_on_synthetic_data(
        sae,
        _Directions(features),
        _Replay(magnitudes),
        num_samples=len(magnitudes),
        batch_size=EVALUATED,
    )
    return dict(found.to_dict())


def main(call: str, result: str) -> None:
    """Train as the JSON `call` describes and write the figures to the file `result`."""
    arguments = json.loads(call)
    torch.set_num_threads(arguments.pop("threads"))
    Path(result).write_text(json.dumps(train_and_evaluate(**arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
