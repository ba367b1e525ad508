"""Activations, neurons and latents of the tokens of passages that training would keep."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from lightning_sae.analysis.evaluation.passages import Blocks
from lightning_sae.analysis.evaluation.progress import Progress, say_nothing
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.language_model import LanguageModel

ROWS_TIMES_LATENTS = 2**23


class Sample(NamedTuple):
    """The n tokens of some blocks that training would keep.

    Attributes:
        x: Activations at the hook, [n, d_in].
        neurons: Activations of the MLP's neurons in the same layer; those at the hook if the model
            has no hook for them.
        neurons_at: The hook of the neurons.
        token: Index of each among all tokens of the passages.
        block: Index of its block.
        ids: Token ids.
    """

    x: Float[Tensor, "n d_in"]
    neurons: Float[Tensor, "n d_mlp"]
    neurons_at: str
    token: Int[Tensor, " n"]
    block: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]


def read_sample(
    data: ActivationDataModule, blocks: Blocks, say: Callable[[str], None] = say_nothing
) -> Sample:
    """Run the language model on blocks of text, up to the hook and up to the neurons."""
    model = data.language_model
    at_neurons = neurons_of(model)
    which = torch.arange(len(blocks.tokens)).unsqueeze(1).expand_as(blocks.tokens)
    found: list[tuple[Tensor, ...]] = []
    progress = Progress(say, "reading tokens for probes", len(blocks.tokens))
    for rows in torch.arange(len(blocks.tokens)).split(data.blocks_per_pass):
        tokens = blocks.tokens[rows]
        x = model.activations(tokens).cpu()
        kept = data.filter.kept(tokens, x)
        neurons = x if at_neurons is None else at_neurons.activations(tokens).cpu()
        parts = (x.float(), neurons.float(), blocks.number[rows], which[rows], tokens)
        found.append(tuple(part[kept] for part in parts))
        progress.add(len(rows))
    x, neurons, token, block, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    name = model.hook_name if at_neurons is None else at_neurons.hook_name
    return Sample(x, neurons, name, token, block, ids)


def neurons_of(model: LanguageModel) -> LanguageModel | None:
    """The model at the neurons of the hook's layer; None if they are missing or are the hook."""
    layer = re.match(r"blocks\.(\d+)\.", model.hook_name)
    name = f"blocks.{layer[1]}.mlp.hook_post" if layer else ""
    if not layer or name == model.hook_name or not model.has(name):
        return None
    try:
        return model.at(name)
    except ValueError:  # an MLP of an unknown form
        return None


@torch.no_grad()
def latents_of(sae: SparseAutoencoder, x: Float[Tensor, "n d_in"]) -> csr_matrix:
    """Latents of activations as a sparse matrix [n, d_sae]."""
    device = sae.W_dec.device
    chunks = x.split(max(1, ROWS_TIMES_LATENTS // sae.d_sae))
    parts = [csr_matrix(sae.encode(rows.to(device)).float().cpu().numpy()) for rows in chunks]
    return vstack(parts, format="csr")


def means_of_blocks(rows: Any, block: Int[Tensor, " n"], blocks: Int[Tensor, " m"]) -> Any:
    """Mean of the rows of each block, [m, d]; `rows` is a matrix, sparse or not."""
    place = torch.searchsorted(blocks, block).numpy()
    n = np.bincount(place, minlength=len(blocks))
    weights = 1.0 / n[place]
    average = csr_matrix((weights, (place, np.arange(len(place)))), (len(blocks), len(place)))
    return np.asarray((average @ rows).todense() if hasattr(rows, "tocsr") else average @ rows)
