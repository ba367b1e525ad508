"""Figures of SAEs whose lowest activations are removed, for all ways and levels on one pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.functional import kl_divergence, next_token_cross_entropy
from lightning_sae.functional.removal import (
    Firings,
    firings,
    ranks_among_firing,
    without_below,
    without_lowest,
)
from lightning_sae.metrics import FVU, L0, MSE, RelativeReconstructionBias
from lightning_sae.studies.shared.rows import Row

WHOLE = "whole"
WAYS = {
    "lowest_k": "lowest k of each token",
    "share_of_maximum": "below a share of each latent's maximum",
    "quantile": "below a quantile of each latent",
    "global": "below one threshold",
}
"""The ways of removing by name, in the order of the source, with their labels."""


@dataclass(frozen=True)
class Removal:
    """A way of removing low activations, at one level.

    Attributes:
        way: Its name in `WAYS`, or `whole` if nothing is removed.
        share: Target share of all firings to remove.
        level: k, share of the maximum, quantile or threshold, depending on the way.
        apply: Maps latent activations and their ranks to the remaining activations.
    """

    way: str
    share: float
    level: float
    apply: Callable[[Tensor, Tensor], Tensor]


def removals(
    found: Firings, shares: Sequence[float], ways: Sequence[str] = tuple(WAYS)
) -> list[Removal]:
    """Nothing removed, and each way at the levels that remove these shares of all firings.

    Args:
        found: How strongly latents fire, on text that is not used for evaluation.
        shares: Each from 0 to below 1.
        ways: Names of `WAYS`.
    """
    made = [Removal(WHOLE, 0.0, 0.0, lambda f, _: f)]
    for share in shares:
        k, part = found.lowest_per_token(share), found.share_of_maximum(share)
        if k not in [removal.level for removal in made if removal.way == "lowest_k"] and k > 0:
            made.append(Removal("lowest_k", share, k, _lowest(k)))
        made += [
            Removal("share_of_maximum", share, part, _below(part * found.maxima)),
            Removal("quantile", share, share, _below(found.quantile_thresholds(share))),
        ]
        threshold = found.global_threshold(share)
        made.append(Removal("global", share, threshold, _below(threshold)))
    return [removal for removal in made if removal.way in (WHOLE, *ways)]


def _lowest(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, ranks: without_lowest(f, k, ranks)


def _below(threshold: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, _: without_below(f, threshold)


@torch.no_grad()
def firings_of(
    saes: Mapping[str, SparseAutoencoder], data: ActivationDataModule, n_tokens: int
) -> dict[str, Firings]:
    """How strongly latents fire on training text.

    Args:
        saes: By name.
        data: The stream at their hook.
        n_tokens: Approximate number of tokens to read. Their activations are held in memory.
    """
    batches = list(_training_rows(data, n_tokens))
    return {name: firings(sae.encode(rows) for rows in batches) for name, sae in saes.items()}


def _training_rows(
    data: ActivationDataModule, n_tokens: int
) -> Iterator[Float[Tensor, "rows d_in"]]:
    blocks = data.training_blocks()
    for _ in range(max(1, round(n_tokens / (data.blocks_per_pass * data.context_length)))):
        tokens = blocks.read(data.blocks_per_pass)
        activations = data.language_model.activations(tokens)
        yield activations[data.filter.kept(tokens, activations).to(activations.device)].float()


class Block:
    """Some held-out tokens, their activations at the hook, and the model's predictions.

    Args:
        data: The stream at the hook.
        tokens: The tokens.

    Attributes:
        clean: Logits of the unchanged model.
        rows: The activations that the data's filter keeps.
    """

    def __init__(
        self, data: ActivationDataModule, tokens: Int[Tensor, "blocks context_length"]
    ) -> None:
        self.model, self.tokens = data.language_model, tokens
        found: list[Tensor] = []

        def note(activations: Tensor) -> Tensor:
            found.append(activations.clone())  # the model may change them in place
            return activations

        self.clean = self.model.logits(tokens, note)
        self.activations = found[0]
        self.kept = data.filter.kept(tokens, self.activations).to(self.activations.device)
        self.rows = self.activations[self.kept].float()
        special = torch.tensor(data.special_tokens, dtype=torch.long)
        self.target = tokens.to(self.clean.device)
        self.counted = ~(torch.isin(tokens, special) | (tokens < 0)).to(self.clean.device)

    def logits_with(
        self, rows: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "blocks context_length vocab"]:
        """Logits with the block's activations replaced by these rows."""
        replaced = self.activations.clone()
        replaced[self.kept] = rows.to(replaced.dtype)
        return self.model.logits(self.tokens, lambda _: replaced)

    def cross_entropy(self, logits: Tensor) -> tuple[float, int]:
        """Sum of nats over the predictions of ordinary tokens, and their number."""
        nats, n = next_token_cross_entropy(logits, self.target, self.counted)
        return float(nats), int(n)

    def divergence(self, logits: Tensor) -> float:
        """KL divergence from the unchanged model, summed over predictions of ordinary tokens."""
        return float(kl_divergence(self.clean, logits, self.counted)[0])


@dataclass
class Tally:
    """Sums over the blocks, for one SAE, way and level."""

    metrics: MetricCollection
    nats: float = 0.0
    divergence: float = 0.0
    n: int = 0

    def add(self, block: Block, f: Tensor, x_hat: Tensor) -> None:
        """Add a block, its latents and its reconstruction."""
        self.metrics.update(x=block.rows, x_hat=x_hat, f=f)
        logits = block.logits_with(x_hat)
        nats, n = block.cross_entropy(logits)
        self.nats, self.n = self.nats + nats, self.n + n
        self.divergence += block.divergence(logits)

    def figures(self) -> dict[str, float]:
        """Means per token: `l0`, `mse`, `fvu` and `gamma` in raw units, `ce` and `kl` in nats."""
        outside = {name: float(value) for name, value in self.metrics.compute().items()}
        return {**outside, "ce": self.nats / self.n, "kl": self.divergence / self.n}


@torch.no_grad()
def measure(
    saes: Mapping[str, SparseAutoencoder],
    ways: Mapping[str, Sequence[Removal]],
    data: ActivationDataModule,
    n_tokens: int,
) -> tuple[list[Row], float]:
    """Figures of all SAEs, ways and levels on the same held-out text, which is read once.

    Each SAE encodes an activation once; after each removal the code is decoded and spliced in.
    gamma is the relative reconstruction bias, below 1 if reconstructions are too small.

    Args:
        saes: By name, on raw activations.
        ways: The removals of each.
        data: The stream at their hook.
        n_tokens: Held-out tokens to read.

    Returns:
        A row for each SAE, way and level, and the cross-entropy of the unchanged model in nats per
        token.
    """
    tallies = {
        name: [Tally(_metrics(saes[name].d_in)) for _ in each] for name, each in ways.items()
    }
    clean, n_clean = 0.0, 0
    for tokens in data.held_out_tokens(n_tokens):
        block = Block(data, tokens)
        nats, n = block.cross_entropy(block.clean)
        clean, n_clean = clean + nats, n_clean + n
        for name, sae in saes.items():
            f = sae.encode(block.rows)
            ranks = ranks_among_firing(f)
            for removal, tally in zip(ways[name], tallies[name], strict=True):
                left = removal.apply(f, ranks)
                tally.add(block, left, sae.decode(left))
    rows = [
        {"sae": name, "way": removal.way, "share": removal.share, "level": removal.level}
        | tally.figures()
        for name, each in ways.items()
        for removal, tally in zip(each, tallies[name], strict=True)
    ]
    return rows, clean / n_clean


def _metrics(d_in: int) -> MetricCollection:
    return MetricCollection(
        {"l0": L0(), "mse": MSE(), "fvu": FVU(d_in), "gamma": RelativeReconstructionBias()}
    )
