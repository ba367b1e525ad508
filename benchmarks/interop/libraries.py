"""The other libraries' own readers, and what they compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.utils import load_dictionary
from jaxtyping import Float
from sae_lens import SAE
from sparsify import SparseCoder
from torch import Tensor

from benchmarks.interop.compare import Side

HEADS = 4
"""Of the embedded model's attention; SAELens takes `hook_z` head by head."""


def saelens(folder: Path, dtype: torch.dtype = torch.float32) -> Side:
    """What SAELens computes of a folder, in a dtype."""
    sae: Any = SAE.load_from_disk(folder, device="cpu").to(dtype=dtype)
    if not sae.hook_z_reshaping_mode:
        return Side(sae.encode, sae.decode)

    def encode(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
        return sae.encode(x.unflatten(-1, (HEADS, -1)).unsqueeze(0)).squeeze(0)

    def decode(f: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_in"]:
        return sae.decode(f.unsqueeze(0)).squeeze(0).flatten(-2)

    return Side(encode, decode)


def dictionary_learning(folder: Path) -> Side:
    """What dictionary_learning computes of a folder."""
    ae, _ = load_dictionary(str(folder), "cpu")
    return of_dictionary(ae)


def of_dictionary(ae: Any) -> Side:
    """What a dictionary of dictionary_learning computes."""
    ae = ae.float()
    return Side(ae.encode, ae.decode)


def sparsify(folder: Path) -> Side:
    """What sparsify computes of a folder."""
    return of_sparse_coder(SparseCoder.load_from_disk(folder))


def of_sparse_coder(coder: Any) -> Side:
    """What a `SparseCoder` computes, its codes as matrices."""
    coder = coder.float()

    def encode(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
        acts, indices, _ = coder.encode(x)
        return torch.zeros(len(x), coder.num_latents).scatter_(1, indices, acts)

    def decode(f: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_in"]:
        acts, indices = f.topk(coder.cfg.k)
        return coder.decode(acts, indices)

    return Side(encode, decode)


LIBRARIES: dict[str, Callable[..., Side]] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}
"""Readers by the name of their format."""
