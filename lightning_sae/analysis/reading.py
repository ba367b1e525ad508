"""One pass over text: what every latent of an SAE fires on.

The text is read by Lightning's `Trainer.predict`, so accelerator, precision and devices are its
arguments. With n ranks, each runs every n-th pass of the model, and rank 0 merges their results,
which equals the result of a single rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sae.analysis.firing import Contexts, Firings, PairCounts, Strengths, together
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule

Tokens = Int[Tensor, "blocks context_length"]
BEFORE, AFTER = 24, 7
"""Tokens shown before and after the one on which a latent fires."""


class Passes:
    """This rank's share of the blocks of tokens, with the index of the first block of each pass.

    Args:
        data: Provides the tokens.
        n_tokens: Approximate number of tokens to read, over all ranks.
        trainer: Provides the rank.
    """

    def __init__(self, data: ActivationDataModule, n_tokens: int, trainer: Trainer) -> None:
        self.data, self.trainer = data, trainer
        per_pass = data.blocks_per_pass * data.context_length
        self.n = max(1, round(n_tokens / per_pass))

    def __iter__(self) -> Iterator[tuple[int, Tokens]]:
        blocks, size = self.data.training_blocks(), self.data.blocks_per_pass
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        for i in range(self.n):
            tokens = blocks.read_first_epoch(size)
            if len(tokens) == 0:
                return
            if i % ranks == rank:
                yield i * size, tokens


class Reader(LightningModule):
    """Runs a language model and an SAE on blocks of tokens.

    Args:
        sae: The SAE, in evaluation mode.
        data: Its language model and filter.
    """

    def __init__(self, sae: SparseAutoencoder, data: ActivationDataModule) -> None:
        super().__init__()
        self.sae, self.data = sae, data

    def activations(self, tokens: Tokens) -> tuple[Float[Tensor, "rows d_in"], Bool[Tensor, "..."]]:
        """Raw activations of all tokens as rows, and a mask of those that training keeps."""
        x = self.data.language_model.activations(tokens)
        kept = self.data.filter.kept(tokens.cpu(), x)
        return x.float().flatten(0, 1), kept.flatten().to(x.device)

    def rows_at_a_time(self) -> int:
        """Number of rows whose latents may be held as a dense matrix."""
        return max(1, 2**23 // self.sae.d_sae)


class FiringReader(Reader):
    """Collects what each latent fires on.

    Args:
        sae: The SAE, in evaluation mode.
        data: Its language model, text and filter.
        n_tokens: Approximate number of tokens to read.
        n_top: Strongest contexts kept for each latent.
        per_interval: Contexts drawn from each octave of activation.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        data: ActivationDataModule,
        n_tokens: int,
        n_top: int = 12,
        per_interval: int = 3,
    ) -> None:
        super().__init__(sae, data)
        self.n_tokens, self.n_top, self.per_interval = n_tokens, n_top, per_interval
        self.left_out = 0
        self.tokens: dict[int, Tokens] = {}

    def predict_dataloader(self) -> Passes:
        """The text."""
        return Passes(self.data, self.n_tokens, self.trainer)

    @override
    def on_predict_start(self) -> None:
        """Create empty statistics; all ranks take the reference from the first pass of the text."""
        tokens = self.data.training_blocks().read_first_epoch(self.data.blocks_per_pass)
        x, kept = self.activations(tokens)
        largest = [float(self.sae.encode(rows).max()) for rows in self._chunks(x[kept])]
        reference, d_sae = max([1e-6, *largest]), self.sae.d_sae
        self.strengths = Strengths(d_sae, reference)
        self.contexts = Contexts(d_sae, self.n_top, self.per_interval, reference)
        self.on_tokens = PairCounts(len(self.data.language_model.tokenizer), by="sums")
        self.on_latents = PairCounts(d_sae)

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.rows_at_a_time())

    @override
    def predict_step(self, batch: tuple[int, Tokens], batch_idx: int) -> int:
        """Add one pass; return the number of firings."""
        first, tokens = batch[0], batch[1]
        x, kept = self.activations(tokens)
        numbers = torch.arange(tokens.numel(), device=x.device)[kept]
        firings = self._firings(x[kept], numbers + first * self.data.context_length)
        in_pass = firings.token - first * self.data.context_length
        self.tokens[first] = tokens.cpu().int()
        self.left_out += int((~kept).sum())
        self.strengths.update(firings, int(kept.sum()))
        self.contexts.update(firings, self.data.context_length)
        self.on_tokens.update(firings.latent, tokens.cpu().flatten()[in_pass], firings.value)
        self.on_latents.update(*together(firings))
        return len(firings.value)

    def _firings(self, x: Float[Tensor, "rows d_in"], numbers: Int[Tensor, " rows"]) -> Firings:
        found = []
        for rows, own in zip(self._chunks(x), numbers.split(self.rows_at_a_time()), strict=True):
            f = self.sae.encode(rows)
            row, latent = f.nonzero(as_tuple=True)
            found.append((own[row].cpu(), latent.cpu(), f[row, latent].float().cpu()))
        if not found:
            empty = torch.zeros(0, dtype=torch.int64)
            return Firings(empty, empty, torch.zeros(0))
        return Firings(*(torch.cat(part) for part in zip(*found, strict=True)))

    @override
    def on_predict_epoch_end(self) -> None:
        """Merge the results of all ranks on rank 0."""
        own: tuple[Any, ...] = (self.strengths, self.contexts, self.on_tokens, self.on_latents)
        for other in gathered(self.trainer, (own, self.tokens, self.left_out))[1:]:
            for mine, its in zip(own, other[0], strict=True):
                mine.merge(its)
            self.tokens |= other[1]
            self.left_out += other[2]

    def text(self) -> Tokens:
        """All blocks that were read, in order; only on rank 0."""
        return torch.cat([self.tokens[first] for first in sorted(self.tokens)])


class ContextReader(Reader):
    """Reads the chosen contexts again, to get a latent's activation on every token in them.

    Args:
        sae: The SAE, in evaluation mode.
        data: Its language model and filter.
        text: All blocks.
        chosen: Result of `Contexts.chosen`.
        largest: Largest activation of each latent, by which `shares` are divided.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        data: ActivationDataModule,
        text: Tokens,
        chosen: dict[str, Tensor],
        largest: Float[Tensor, " d_sae"],
    ) -> None:
        super().__init__(sae, data)
        self.text, self.chosen, self.largest = text, chosen, largest
        n, length = len(chosen["token"]), BEFORE + 1 + AFTER
        self.tokens = torch.full((n, length), -1, dtype=torch.int32)
        self.shares = torch.zeros(n, length, dtype=torch.float16)

    def predict_dataloader(self) -> "OneLoader":
        """Indices of this rank's share of the blocks that contain a context, in small passes."""
        blocks = (self.chosen["token"] // self.text.shape[1]).unique()
        size = max(1, self.rows_at_a_time() // self.text.shape[1])
        size = min(size, self.data.blocks_per_pass)
        passes = list(blocks.split(size))
        return OneLoader(passes[self.trainer.global_rank :: self.trainer.world_size])

    @override
    def predict_step(self, batch: Int[Tensor, " blocks"], batch_idx: int) -> int:
        """Fill in the contexts of some blocks; return their number."""
        blocks, length = batch.cpu(), self.text.shape[1]
        x, kept = self.activations(self.text[blocks].long())
        f = (self.sae.encode(x) * kept.unsqueeze(1)).view(len(blocks), length, -1).cpu()
        block, position = self.chosen["token"] // length, self.chosen["token"] % length
        own = torch.isin(block, blocks).nonzero().squeeze(1)
        place = torch.searchsorted(blocks, block[own]).unsqueeze(1)
        window = position[own].unsqueeze(1) + torch.arange(-BEFORE, AFTER + 1)
        inside = (window >= 0) & (window < length)
        window = window.clamp(0, length - 1)
        latent = self.chosen["latent"][own].unsqueeze(1)
        shares = f[place, window, latent].float() / self.largest[latent]
        self.shares[own] = torch.where(inside, shares, 0.0).half()
        self.tokens[own] = torch.where(inside, self.text[blocks][place, window], -1)
        return len(own)

    @override
    def on_predict_epoch_end(self) -> None:
        """Merge the contexts of all ranks on rank 0."""
        for tokens, shares in gathered(self.trainer, (self.tokens, self.shares))[1:]:
            filled = (tokens >= 0).any(1)
            self.tokens[filled], self.shares[filled] = tokens[filled], shares[filled]


class OneLoader:
    """Batches from a list, which Lightning itself would treat as several data loaders."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


def gathered(trainer: Trainer, own: Any) -> list[Any]:
    """The values of all ranks, in order of rank."""
    if trainer.world_size == 1:
        return [own]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, own)
    return found
