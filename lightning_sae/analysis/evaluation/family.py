"""Train smaller models by the recipe of the embedded one: loss against compute.

    python -m lightning_sae.analysis.evaluation.family --output curve.json

The largest has a 9th of the embedded model's compute, every other a third of the next larger;
tokenizer, text, context, batch and learning rate are those of the embedded model. The losses are
stored in `embedded_curve.json`.
"""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything

from lightning_sae.analysis.evaluation.compute import Curve, fit_curve
from lightning_sae.data.embedded import EMBEDDED_MODEL, standard_library_documents
from lightning_sae.data.embedded.recipe import Settings, build_network, evaluate, fit, pack, split
from lightning_sae.data.pretrained import load_network, load_tokenizer
from lightning_sae.files import write_atomically

CONTEXT = 128
"""Predictions per window when models are scored: the context length of SAE training."""


class Size(NamedTuple):
    """A smaller model; heads are 32 wide, as in the embedded model."""

    width: int
    layers: int
    part: int  # its compute is the embedded model's divided by this
    seeds: int  # models of this size


SIZES = (
    Size(32, 1, 243, 2),
    Size(32, 2, 81, 2),
    Size(64, 1, 27, 2),
    Size(64, 3, 9, 1),
)


def compute(parameters: int, settings: Settings) -> float:
    """Training compute in FLOP: 6 times parameters times tokens (Kaplan et al. 2020, section 2.1).

    Embeddings are included, because the tied unembedding multiplies with them.
    """
    return 6.0 * parameters * settings.steps * settings.batch_size * settings.context


def settings_of(size: Size, seed: int, own: Settings, parameters: int) -> Settings:
    """The recipe's settings for a smaller model, with the steps that its compute allows."""
    smaller = replace(own, width=size.width, layers=size.layers, heads=size.width // 32, seed=seed)
    n = build_network(smaller, own.vocabulary).num_parameters()
    return replace(smaller, steps=round(own.steps * parameters / size.part / n))


def points() -> list[dict[str, Any]]:
    """Train and score the smaller models, and score the embedded one, which comes last."""
    own = Settings()
    train, rest = split(standard_library_documents())
    tokenizer = load_tokenizer(str(EMBEDDED_MODEL), {})
    embedded = load_network(str(EMBEDDED_MODEL), torch.float32, {})
    tokens = pack(tokenizer, train)
    found = []
    for size in SIZES:
        for seed in range(size.seeds):
            settings = settings_of(size, seed, own, embedded.num_parameters())
            seed_everything(seed)
            network = build_network(settings, own.vocabulary)
            started = time.monotonic()
            fit(network, tokens, settings)
            seconds = time.monotonic() - started
            found.append(_point(network, tokenizer, rest, settings) | {"seconds": round(seconds)})
            print(found[-1], flush=True)  # noqa: T201
    return [*found, _point(embedded, tokenizer, rest, own)]


def _point(
    network: Any, tokenizer: Any, texts: Sequence[str], settings: Settings
) -> dict[str, Any]:
    parameters = network.num_parameters()
    return {
        "compute": compute(parameters, settings),
        "loss": evaluate(network, tokenizer, texts, CONTEXT).cross_entropy,
        "parameters": parameters,
        "width": settings.width,
        "layers": settings.layers,
        "steps": settings.steps,
        "seed": settings.seed,
    }


def with_fit(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Points, the curve through them and its error, and how they were made.

    Args:
        found: The points, the model's own last.
    """
    own = found[-1]["compute"]
    compute, loss = (np.array([point[key] for point in found]) for key in ("compute", "loss"))
    fit = fit_curve(Curve(own, compute, loss))
    return {
        "model": "embedded",
        "made_by": "python -m lightning_sae.analysis.evaluation.family --output curve.json",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "unit": "FLOP; losses in nats per token",
        "context_length": CONTEXT,
        "own_compute": own,
        "fit": {
            "form": "ln compute = c0 + c1 ln loss + c2 (ln loss)^2",
            "coefficients": fit.coefficients.tolist(),
            "covariance": fit.covariance.tolist(),
            "residual": fit.residual,
        },
        "points": [*found],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the family and write its points.

    Args:
        arguments: Command-line arguments; those of the process if not given.

    Raises:
        ValueError: If the file exists.
    """
    parser = ArgumentParser(prog="python -m lightning_sae.analysis.evaluation.family")
    parser.add_argument("--output", type=Path, required=True, help="new file for the points")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise ValueError(
            f"Expected argument `output` to be a new file but {options.output} exists: choose "
            "another."
        )
    text = json.dumps(with_fit(points()), indent=1) + "\n"
    write_atomically(options.output, lambda path: path.write_text(text))
    print(f"Made: {options.output}")  # noqa: T201


if __name__ == "__main__":
    main()
