"""The figures of `lightning-sae test` for several SAEs, in one pass over the held-out text."""

from collections.abc import Callable, Mapping

import torch

from lightning_sae.analysis.evaluation.progress import Progress, say_nothing
from lightning_sae.analysis.in_model import evaluate_all_in_model
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.metrics import held_out_metrics


@torch.no_grad()
def held_out_figures(
    saes: Mapping[str, SparseAutoencoder],
    data: ActivationDataModule,
    n_tokens: int,
    say: Callable[[str], None] = say_nothing,
) -> dict[str, dict[str, float]]:
    """Metrics on held-out activations and in the language model, by name of the SAE.

    Args:
        saes: SAEs by name, on one device.
        data: Provides the held-out text and the language model.
        n_tokens: Approximate number of tokens to read.
        say: Called with progress messages.
    """
    metrics = {name: held_out_metrics(sae.d_in, sae.d_sae) for name, sae in saes.items()}
    progress = Progress(say, "reading activations", n_tokens)
    for batch in HeldOutBatches(data, n_tokens):
        for name, sae in saes.items():
            x = batch.to(sae.W_dec.device)
            f = sae.encode(x)
            metrics[name].to(x.device).update(x=x, x_hat=sae.decode(f), f=f)
        progress.add(len(batch))
    progress = Progress(say, "running the model with SAEs spliced in", n_tokens)
    in_model = evaluate_all_in_model(
        {name: sae.forward for name, sae in saes.items()}, data, n_tokens, seen=progress.add
    )
    found = {}
    for name in saes:
        values = metrics[name].compute()
        del values["frequency"]
        found[name] = {key: float(value) for key, value in values.items()} | in_model[name]
    return found
