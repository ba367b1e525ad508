"""Log what latents fire on, as text, and their decoder rows with tokens as labels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sae.analysis.firing import Contexts, Firings, PairCounts
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.callbacks.loggers import log_table, writers
from lightning_sae.checks import expect
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.source import source_of

N_CONTEXTS = 4  # contexts of each latent
BEFORE, AFTER = 12, 6  # tokens shown around the one on which it fires
N_LABELS = 3  # number of tokens in a label
COLUMNS = ("latent", "frequency", "activation", "context")


class TopContexts(Callback):
    """Logs at the end of training what latents fire on in some held-out text.

    - `latents/top_contexts`, a text: the strongest contexts of some latents, from the most frequent
      to the rarest, with the token on which a latent fires between « and »;
    - TensorBoard's projector: decoder rows of the most frequent latents, labelled by the tokens on
      which each fires most.

    Needs an `ActivationDataModule` with a tokenizer; with other data nothing is shown, nor of a
    dictionary that is split over devices. For more text and all latents, use `lightning-sae
    analyze`.

    Args:
        n_tokens: Approximate number of held-out tokens to read; at most those of a validation.
        n_latents: Latents whose contexts are shown.
        n_rows: Maximum number of decoder rows in the projector.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(self, n_tokens: int = 16384, n_latents: int = 16, n_rows: int = 2000) -> None:
        for name, value in (("n_tokens", n_tokens), ("n_latents", n_latents), ("n_rows", n_rows)):
            expect(value > 0, name, "positive", value)
        self.n_tokens, self.n_latents, self.n_rows = n_tokens, n_latents, n_rows

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = source_of(trainer)
        shown = trainer.is_global_zero and bool(trainer.loggers)
        if not shown or trainer.fast_dev_run or not isinstance(data, ActivationDataModule):  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SparseAutoencoder) or data.language_model.tokenizer is None:
            return
        if pl_module.parts.n > 1:
            return
        found = read(pl_module, data, min(self.n_tokens, data.n_validation))
        step = trainer.global_step
        rows = table(found, data, self.n_latents)
        if rows:
            log_table(trainer.loggers, "latents/top_contexts", COLUMNS, rows, step)
        most = found.frequency.topk(min(self.n_rows, pl_module.d_sae)).indices
        labels = self._labels(found, data, most)
        for writer in writers(trainer.loggers):
            header = ["latent", "tokens", "log10 frequency"]
            decoder = pl_module.W_dec.detach().float().cpu()[most]
            writer.add_embedding(decoder, labels, None, step, "decoder", header)

    @staticmethod
    def _labels(
        found: "Found", data: ActivationDataModule, latents: Int[Tensor, " n"]
    ) -> list[list[str]]:
        partners = found.on_tokens.first(len(found.frequency), N_LABELS)[0]
        log_frequency = found.frequency.clamp_min(0.5 / found.n_tokens).log10()
        return [
            [
                str(latent),
                " ".join(spelled(data, [t for t in partners[latent].tolist() if t >= 0])) or "-",
                f"{log_frequency[latent]:.2f}",
            ]
            for latent in latents.tolist()
        ]


class Found(NamedTuple):
    """Firings found in some text.

    Attributes:
        blocks: The text in blocks.
        contexts: The strongest firings of each latent.
        on_tokens: The tokens on which each latent fires.
        frequency: Share of the tokens on which each latent fires, [d_sae].
        n_tokens: Number of these tokens.
    """

    blocks: Int[Tensor, "blocks context_length"]
    contexts: Contexts
    on_tokens: PairCounts
    frequency: Tensor
    n_tokens: int


@torch.no_grad()
def read(sae: SparseAutoencoder, data: ActivationDataModule, n_tokens: int) -> Found:
    """Read this rank's held-out text."""
    contexts = Contexts(sae.d_sae, N_CONTEXTS, 0, 1.0)
    on_tokens = PairCounts(data.language_model.vocabulary, by="sums")
    counts, n_kept = torch.zeros(sae.d_sae), 0
    blocks: list[Tensor] = []
    for tokens in data.held_out_tokens(n_tokens):
        x = data.language_model.activations(tokens)
        kept = data.filter.kept(tokens, x).flatten()
        before = sum(len(block) for block in blocks) * data.context_length
        numbers = kept.nonzero().squeeze(1) + before
        size = max(1, 2**23 // sae.d_sae)  # rows whose latents may be held as a dense matrix
        for own, rows in zip(
            numbers.split(size), x.flatten(0, 1)[kept.to(x.device)].split(size), strict=True
        ):
            firings = _firings(sae, rows.float(), own)
            contexts.update(firings, data.context_length)
            token = tokens.flatten()[firings.token - before]
            on_tokens.update(firings.latent, token, firings.value)
            counts += torch.bincount(firings.latent, minlength=sae.d_sae)
        n_kept += len(numbers)
        blocks.append(tokens)
    return Found(torch.cat(blocks), contexts, on_tokens, counts / max(1, n_kept), n_kept)


def _firings(sae: SparseAutoencoder, rows: Tensor, numbers: Tensor) -> Firings:
    f = sae.encode(rows)
    row, latent = f.nonzero(as_tuple=True)
    return Firings(numbers[row.cpu()], latent.cpu(), f[row, latent].float().cpu())


def table(found: Found, data: ActivationDataModule, n_latents: int) -> list[list[str]]:
    """A row for each of the strongest contexts of some latents, evenly over their frequencies."""
    order = found.frequency.argsort(descending=True)
    order = order[found.frequency[order] > 0]
    if len(order) == 0:
        return []
    some = torch.linspace(0, len(order) - 1, min(n_latents, len(order))).round().long()
    rows = []
    for latent in order[some].tolist():
        values, places = found.contexts.top_values[latent], found.contexts.top_tokens[latent]
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if place >= 0:
                frequency = f"{found.frequency[latent]:.5f}"
                rows.append([str(latent), frequency, f"{value:.2f}", _context(found, data, place)])
    return rows


def _context(found: Found, data: ActivationDataModule, place: int) -> str:
    block, at = found.blocks[place // data.context_length], place % data.context_length
    parts = (block[max(0, at - BEFORE) : at], block[at : at + 1], block[at + 1 : at + 1 + AFTER])
    before, token, after = ("".join(spelled(data, part.tolist())) for part in parts)
    return f"{before}«{token}»{after}"


def spelled(data: ActivationDataModule, tokens: Sequence[int]) -> list[str]:
    """Texts of tokens, each on one line."""
    texts = (
        data.language_model.tokenizer.decode([token if token >= 0 else ~token]) for token in tokens
    )
    return [text.replace("\n", "↵").replace("\r", "").replace("\t", "⇥") for text in texts]
