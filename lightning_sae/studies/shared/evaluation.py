"""Metrics of many SAEs at one hook, on the same held-out text."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from lightning_sae.analysis import evaluate_all_in_model
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.metrics import held_out_metrics
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.rows import Row


def evaluate(
    saes: Mapping[str, SparseAutoencoder], data: ActivationDataModule, n_tokens: int, path: Path
) -> dict[str, Row]:
    """Held-out metrics of SAEs, and the language model's loss with their reconstructions.

    Args:
        saes: SAEs by name; they act on raw activations of one hook.
        data: The stream at that hook.
        n_tokens: Held-out tokens to read.
        path: JSON file of the figures; they are read from it if it exists.

    Returns:
        For each name, the scalars of `held_out_metrics` and of `evaluate_in_model`, and
        `frequency`, a list with the share of activations on which each latent fires.
    """

    def figures() -> dict[str, Row]:
        began = time.perf_counter()
        for sae in saes.values():
            sae.to(data.language_model.device)
        outside = held_out_figures(saes, data, n_tokens)
        replacements = {name: sae.forward for name, sae in saes.items()}
        inside = evaluate_all_in_model(replacements, data, n_tokens)
        seconds = time.perf_counter() - began
        sys.stderr.write(f"evaluated {len(saes)} SAEs on {n_tokens:,} tokens in {seconds:.0f} s\n")
        return {name: outside[name] | inside[name] for name in saes}

    return dict(computed_once(path, figures))


def scalars(figures: Row) -> Row:
    """The scalar figures of an SAE."""
    return {name: value for name, value in figures.items() if not isinstance(value, list)}


@torch.no_grad()
def held_out_figures(
    saes: Mapping[str, SparseAutoencoder], data: ActivationDataModule, n_tokens: int
) -> dict[str, Row]:
    """The metrics of `held_out_metrics` on raw activations, by SAE."""
    metrics = {name: held_out_metrics(sae.d_in, sae.d_sae) for name, sae in saes.items()}
    for x in HeldOutBatches(data, n_tokens):
        for name, sae in saes.items():
            f = sae.encode(x)
            metrics[name].to(x.device).update(x=x, x_hat=sae.decode(f), f=f)
    return {
        name: {key: value.tolist() for key, value in each.compute().items()}
        for name, each in metrics.items()
    }
