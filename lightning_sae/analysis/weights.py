"""Figures of an SAE's latents that depend only on its weights.

Source of neuron sparsity: Rajamanoharan et al. and Nanda, Open source replication of Towards
Monosemanticity (2023), for activations of an MLP, whose coordinates are neurons.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.functional.geometry import unit_rows

ONE_SPARSE, TEN_SPARSE = 0.35, 0.1
"""Thresholds on shares of a row's squared norm; see `neuron_sparsity`."""


@torch.no_grad()
def latent_geometry(sae: SparseAutoencoder) -> dict[str, Float[Tensor, " d_sae"]]:
    """Figures of each latent's encoder and decoder directions.

    Returns:
        `encoder_decoder_cosine`; `projection`, the dot product of encoder and decoder rows (the
        activation of a latent on its own decoder row, without the bias); norms; the bias; the
        figures of `neuron_sparsity` for decoder rows, and their `kurtosis`.
    """
    encoder, decoder = sae.W_enc.T, sae.W_dec
    return {
        "encoder_decoder_cosine": (unit_rows(encoder) * unit_rows(decoder)).sum(-1),
        "projection": (encoder * decoder).sum(-1),
        "encoder_norm": encoder.norm(dim=-1),
        "decoder_norm": decoder.norm(dim=-1),
        "encoder_bias": sae.b_enc.detach().clone(),
        **neuron_sparsity(decoder),
        "kurtosis": excess_kurtosis(decoder),
    }


def neuron_sparsity(rows: Float[Tensor, "rows d_in"]) -> dict[str, Float[Tensor, " rows"]]:
    """How the squared norm of each row is distributed over its coordinates.

    Returns:
        `top_1`, the share of the largest coordinate; `next_9`, that of the nine after it;
        `neurons`: 1 where `top_1` is at least .35, 10 where `next_9` is at least .1 and `top_1` is
        not, else 0, for a dense row.

    Example:
        >>> neuron_sparsity(torch.tensor([[3.0, 4.0, 0.0]]))["top_1"]
        tensor([0.6400])
    """
    shares = unit_rows(rows).square()
    largest = shares.topk(min(10, rows.shape[1]), dim=-1).values
    top, following = largest[:, 0], largest[:, 1:].sum(-1)
    ten = torch.where(following >= TEN_SPARSE, 10.0, 0.0)
    return {
        "top_1": top,
        "next_9": following,
        "neurons": torch.where(top >= ONE_SPARSE, 1.0, ten),
    }


def excess_kurtosis(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, " rows"]:
    """Fourth standardised moment of each row's coordinates, minus 3; 0 for a normal distribution.

    Example:
        >>> excess_kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
        tensor([-2.])
    """
    centred = rows - rows.mean(-1, keepdim=True)
    variance = centred.square().mean(-1).clamp_min(1e-12)
    return centred.pow(4).mean(-1) / variance.square() - 3


def null_space_share(
    rows: Float[Tensor, "rows d_in"], W_out: Float[Tensor, "d_in d_model"], tolerance: float = 1e-2
) -> Float[Tensor, " rows"]:
    """Share of each row's squared norm that the MLP's output matrix maps to almost nothing.

    Args:
        rows: Decoder rows, in the space of an MLP's activations.
        W_out: The matrix that maps activations to the residual stream.
        tolerance: Singular values below this share of the largest count as zero.
    """
    left, singular, _ = torch.linalg.svd(W_out.double(), full_matrices=False)
    seen = unit_rows(rows.double()) @ left[:, singular > tolerance * singular.max()]
    return (1 - seen.square().sum(-1)).clamp(0, 1).float()


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "rows d_in"], n: int, chunk: int = 1024
) -> tuple[Int[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """For each row, the other row with the largest cosine, and that cosine."""
    directions = unit_rows(rows)
    n = min(n, len(rows) - 1)
    found = []
    for start in range(0, len(rows), chunk):
        cosines = directions[start : start + chunk] @ directions.T
        own = torch.arange(len(cosines))
        cosines[own, own + start] = -2.0
        found.append(cosines.topk(n, dim=-1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def pairwise_cosines(
    rows: Float[Tensor, "rows d_in"], seed: int, most: int = 2000
) -> Float[Tensor, " pairs"]:
    """Cosines of all pairs of different rows, of at most `most` rows drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    some = unit_rows(rows[torch.randperm(len(rows), generator=generator)[:most]])
    cosines = some @ some.T
    return cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]


def baseline(d_sae: int, d_in: int, seed: int) -> Float[Tensor, "d_sae d_in"]:
    """Random rows of the same shape, as a baseline for decoder rows."""
    return torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))


def rare_cluster(frequency: Float[Tensor, " d_sae"]) -> Bool[Tensor, " d_sae"]:
    """Latents below the widest gap in the logarithm of frequency, if there is a clear gap.

    The gap is searched among latents that fire, between the 5th and the 95th percentile of their
    ranks; it is clear if it is at least half a decade wide. Otherwise no latent counts as rare.
    """
    firing = frequency > 0
    logs = frequency[firing].double().log10().sort().values
    first, end = int(0.05 * len(logs)), int(0.95 * len(logs))
    gaps = logs[first:end].diff()
    if len(gaps) == 0 or gaps.max() < 0.5:
        return torch.zeros_like(firing)
    edge = logs[first + int(gaps.argmax())]
    return firing & (frequency.double().log10() <= edge)


def logit_weights(
    W_dec: Float[Tensor, "d_sae d_in"],
    to_residual: Float[Tensor, "d_in d_model"] | None,
    unembedding: Float[Tensor, "d_model vocab"],
    n: int,
    chunk: int = 256,
) -> dict[str, Tensor]:
    """Tokens whose logits each latent raises and lowers most by its direct effect.

    Args:
        W_dec: The decoder.
        to_residual: The MLP's output matrix, for SAEs on its activations; None on the residual
            stream.
        unembedding: The unembedding, with the final norm's scale folded in.
        n: Tokens for each latent.
        chunk: Latents processed at a time.

    Returns:
        `raised` and `lowered`, tokens [d_sae, n], and `raised_by`, `lowered_by`, the change of
        their logits for an activation of 1, less the mean over all tokens.
    """
    found: dict[str, list[Tensor]] = {}
    for rows in W_dec.split(chunk):
        through = rows if to_residual is None else rows @ to_residual
        logits = through @ unembedding
        logits -= logits.mean(-1, keepdim=True)
        for name, largest in (("raised", True), ("lowered", False)):
            values, tokens = logits.topk(n, dim=-1, largest=largest)
            found.setdefault(name, []).append(tokens)
            found.setdefault(f"{name}_by", []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


def summary(values: Num[Tensor, " n"] | Bool[Tensor, " n"]) -> dict[str, Any]:
    """Mean and some quantiles, as plain numbers; empty if no value is finite."""
    values = values.double()
    values = values[values.isfinite()]
    if len(values) == 0:
        return {}
    quantiles = {f"q{q:g}": float(values.quantile(q / 100)) for q in (1, 10, 50, 90, 99)}
    return {"mean": float(values.mean()), **quantiles}
