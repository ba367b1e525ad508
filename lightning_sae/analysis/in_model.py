"""The language model's loss when an SAE's reconstruction replaces the activation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.hooks import Edit
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.functional import loss_recovered, perplexity
from lightning_sae.functional.language_modelling import (
    chunk_size,
    cross_entropies,
    divergences,
    log_probabilities,
)

Tokens = Int[Tensor, "blocks context_length"]
Replace = Callable[[Tensor], Tensor]
"""A replacement for activations [..., d_in]."""


ABLATIONS = ("ce_zero_ablation", "ce_mean_ablation")


def evaluate_in_model(
    sae: SparseAutoencoder,
    data: ActivationDataModule,
    n_tokens: int,
    known: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Cross-entropy of the model on held-out text with the activation kept, spliced and ablated.

    The activations that training leaves out (BOS, positions, outliers) are not changed in any
    condition. Predictions of special tokens between documents, and of tokens that are only context,
    do not count. The mean activation is that of the same held-out tokens. With several ranks, every
    rank must call this; each reads its own documents and returns the figures over all ranks.

    Args:
        sae: The SAE; it acts on raw activations.
        data: Provides the language model, its held-out text and the filter of training.
        n_tokens: Approximate number of held-out tokens to read, over all ranks.
        known: Result of an earlier call with the same data and `n_tokens`. Its ablation figures,
            which do not depend on the SAE, are reused, so two passes are enough.

    Returns:
        `ce_clean`, `ce_spliced`, `ce_zero_ablation`, `ce_mean_ablation` and `kl` in nats per
        token; `loss_recovered_zero` and `loss_recovered_mean`, (CE ablated - CE spliced) / (CE
        ablated - CE clean); `perplexity_clean`, `perplexity_spliced`; `n_tokens`, the number of
        counted predictions.
    """
    size = max(1, 2**25 // sae.d_sae)  # rows whose latents may be held as a dense matrix

    def replace(x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        parts = x.flatten(0, -2).split(size)
        return torch.cat([sae(rows) for rows in parts]).view_as(x)

    return evaluate_all_in_model({"": replace}, data, n_tokens, known)[""]


@torch.no_grad()
def evaluate_all_in_model(
    replacements: Mapping[str, Replace],
    data: ActivationDataModule,
    n_tokens: int,
    known: Mapping[str, float] | None = None,
    seen: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """`evaluate_in_model` of several replacements, with the text and the ablations read once.

    Args:
        replacements: By name, functions that replace raw activations [..., d_in].
        data: As for `evaluate_in_model`.
        n_tokens: As for `evaluate_in_model`.
        known: As for `evaluate_in_model`.
        seen: Called after each pass with its number of tokens.

    Returns:
        By name, the figures of `evaluate_in_model`.
    """
    n_tokens = math.ceil(n_tokens / data.n_ranks)
    ablations = _ablations(data, n_tokens) if known is None else {}
    common = dict.fromkeys(["ce_clean", *ablations, "n_tokens"], 0.0)
    spliced, kl_sums = dict.fromkeys(replacements, 0.0), dict.fromkeys(replacements, 0.0)
    special = torch.tensor(data.special_tokens, dtype=torch.long)
    for tokens in _passes(data, n_tokens):
        counted = ~(torch.isin(tokens[:, 1:], special) | (tokens[:, 1:] < 0))
        common["n_tokens"] += int(counted.sum())
        given = [*ablations.values(), *replacements.values()]
        edits = [None, *(_edit(data, tokens, replace) for replace in given)]
        nats, kl = _nats_and_kl(data.language_model, tokens, counted, edits)
        for name, value in zip(("ce_clean", *ablations), nats, strict=False):
            common[name] += value
        own = 1 + len(ablations)
        for name, value, divergence in zip(replacements, nats[own:], kl[own:], strict=True):
            spliced[name] += value
            kl_sums[name] += divergence
        seen(tokens.numel())
    for sums in (common, spliced, kl_sums):
        _add_up(sums, data)
    n_counted = common.pop("n_tokens")
    of_all = {name: nats / n_counted for name, nats in common.items()}
    if known is not None:
        of_all |= {name: known[name] for name in ABLATIONS}
    return {
        name: _summary(
            {
                **of_all,
                "ce_spliced": spliced[name] / n_counted,
                "kl": kl_sums[name] / n_counted,
            },
            round(n_counted),
        )
        for name in replacements
    }


def _ablations(data: ActivationDataModule, n_tokens: int) -> dict[str, Replace]:
    mean = _mean_activation(data, n_tokens)
    return dict(zip(ABLATIONS, (torch.zeros_like, lambda x: mean.to(x).expand_as(x)), strict=True))


def _passes(data: ActivationDataModule, n_tokens: int) -> Iterator[Tokens]:
    """Held-out blocks, one pass at a time; the last pass is cut to `n_tokens`."""
    n_blocks = max(1, round(n_tokens / data.context_length))
    yield from (tokens[:n_blocks] for tokens in data.held_out_tokens(n_tokens))


def _nats_and_kl(
    model: LanguageModel,
    tokens: Tokens,
    counted: Bool[Tensor, "blocks predictions"],
    edits: Sequence[Edit | None],
) -> tuple[list[float], list[float]]:
    """Sums over the counted predictions, for each edit: cross-entropy, and KL from the first edit.

    Logits are computed in chunks, because all of them may need more memory than the model.
    """
    finals = []
    for edit in edits:
        final = model.final(tokens, edit)
        finals.append(final[:, :-1][counted.to(final.device)])
    targets = tokens[:, 1:][counted].to(finals[0].device)
    nats, kl = [0.0] * len(edits), [0.0] * len(edits)
    size = chunk_size(len(targets), model.vocabulary)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        clean = log_probabilities(model.unembed(finals[0][rows]))
        for i, final in enumerate(finals):
            log_p = log_probabilities(model.unembed(final[rows])) if i else clean
            own = targets[rows].to(log_p.device)
            nats[i] += float(cross_entropies(log_p, own).sum(dtype=torch.float64))
            kl[i] += float(divergences(clean, log_p).sum(dtype=torch.float64))
    return nats, kl


def _add_up(sums: dict[str, float], data: ActivationDataModule) -> None:
    """Sum over all ranks, in place."""
    own = torch.tensor(list(sums.values()), dtype=torch.float64)
    sums.update(zip(sums, data.of_all_ranks(own, "sum").tolist(), strict=True))


def _summary(nats: dict[str, float], count: int) -> dict[str, float]:
    clean, spliced = nats["ce_clean"], nats["ce_spliced"]
    return {
        **nats,
        "loss_recovered_zero": float(loss_recovered(clean, spliced, nats["ce_zero_ablation"])),
        "loss_recovered_mean": float(loss_recovered(clean, spliced, nats["ce_mean_ablation"])),
        "perplexity_clean": float(perplexity(clean)),
        "perplexity_spliced": float(perplexity(spliced)),
        "n_tokens": count,
    }


def _edit(data: ActivationDataModule, tokens: Tokens, replace: Replace) -> Edit:
    """Replace the activations that training keeps."""

    def edit(
        activations: Float[Tensor, "blocks context_length d_in"],
    ) -> Float[Tensor, "blocks context_length d_in"]:
        kept = _kept(data, tokens, activations)
        replaced = replace(activations.float()).to(activations.dtype)
        return torch.where(kept.unsqueeze(-1), replaced, activations)

    return edit


def _kept(
    data: ActivationDataModule, tokens: Tokens, activations: Tensor
) -> Bool[Tensor, "blocks context_length"]:
    return data.filter.kept(tokens, activations).to(activations.device)


def _mean_activation(data: ActivationDataModule, n_tokens: int) -> Float[Tensor, " d_in"]:
    sums = torch.zeros(
        data.language_model.width() + 1, dtype=torch.float64
    )  # sum of activations, and their number
    for rows in _kept_rows(data, n_tokens):
        sums[:-1] += rows.double().sum(0).cpu()
        sums[-1] += len(rows)
    sums = data.of_all_ranks(sums, "sum")
    return sums[:-1] / sums[-1].clamp_min(1)


def _kept_rows(data: ActivationDataModule, n_tokens: int) -> Iterator[Float[Tensor, "rows d_in"]]:
    for tokens in _passes(data, n_tokens):
        activations = data.language_model.activations(tokens)
        yield activations[_kept(data, tokens, activations)]
