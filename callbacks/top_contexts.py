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
from lightning_sae.distributed.split import copies_of

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

    Needs an `ActivationDataModule` with a tokenizer; with other data nothing is shown. The parts of
    a split dictionary read the same text, each for its own latents. For more text and all latents,
    use `lightning-sae analyze`.

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
        # Also on ranks that hold a part of the dictionary of rank 0.
        shown = copies_of(trainer).own == 0 and bool(trainer.loggers)
        if not shown or trainer.fast_dev_run or not isinstance(data, ActivationDataModule):  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SparseAutoencoder) or data.language_model.tokenizer is None:
            return
        found = read(pl_module, data, min(self.n_tokens, data.n_validation))
        rows = table(found, data, self.n_latents)
        most = found.frequency.topk(min(self.n_rows, pl_module.d_sae)).indices
        labels, decoder = labels_of(found, data, most), found.of(pl_module.W_dec, most)
        if trainer.is_global_zero:
            self._log(trainer, rows, labels, decoder.float().cpu())

    @staticmethod
    def _log(
        trainer: Trainer, rows: list[list[str]], labels: list[list[str]], decoder: Tensor
    ) -> None:
        step = trainer.global_step
        if rows:
            log_table(trainer.loggers, "latents/top_contexts", COLUMNS, rows, step)
        for writer in writers(trainer.loggers):
            header = ["latent", "tokens", "log10 frequency"]
            writer.add_embedding(decoder, labels, None, step, "decoder", header)


class Found(NamedTuple):
    """Firings found in some text.

    Attributes:
        blocks: The text in blocks.
        contexts: The strongest firings of each latent of this device.
        on_tokens: The tokens on which each of them fires.
        frequency: Share of the tokens on which each latent of all devices fires, [d_sae].
        n_tokens: Number of these tokens.
        sae: The SAE.
    """

    blocks: Int[Tensor, "blocks context_length"]
    contexts: Contexts
    on_tokens: PairCounts
    frequency: Tensor
    n_tokens: int
    sae: SparseAutoencoder

    def of(self, own: Tensor, latents: Int[Tensor, " n"]) -> Tensor:
        """Rows of some latents, gathered from the tables of all parts."""
        rows, device = own.detach().to(self.sae.device), self.sae.device
        return self.sae.parts.picked(rows, latents.to(device), self.sae.d_sae).cpu()


@torch.no_grad()
def read(sae: SparseAutoencoder, data: ActivationDataModule, n_tokens: int) -> Found:
    """Read this rank's held-out text, for the latents of this device."""
    n_own = sae.d_sae // sae.parts.n
    contexts = Contexts(n_own, N_CONTEXTS, 0, 1.0)
    on_tokens = PairCounts(data.language_model.vocabulary, by="sums")
    counts, n_kept = torch.zeros(n_own), 0
    blocks: list[Tensor] = []
    for tokens in data.held_out_tokens(n_tokens):
        # Those of the first part: language models on different devices may differ by rounding.
        x = sae.parts.as_first(data.language_model.activations(tokens).to(sae.device))
        kept = data.filter.kept(tokens, x).flatten()
        before = sum(len(block) for block in blocks) * data.context_length
        numbers = kept.nonzero().squeeze(1) + before
        size = max(1, 2**23 // n_own)  # rows whose latents may be held as a dense matrix
        for own, rows in zip(
            numbers.split(size), x.flatten(0, 1)[kept.to(x.device)].split(size), strict=True
        ):
            firings = _firings(sae, rows.float(), own)
            contexts.update(firings, data.context_length)
            token = tokens.flatten()[firings.token - before]
            on_tokens.update(firings.latent, token, firings.value)
            counts += torch.bincount(firings.latent, minlength=n_own)
        n_kept += len(numbers)
        blocks.append(tokens)
    frequency = sae.parts.joined((counts / max(1, n_kept)).to(sae.device)).cpu()
    return Found(torch.cat(blocks), contexts, on_tokens, frequency, n_kept, sae)


def _firings(sae: SparseAutoencoder, rows: Tensor, numbers: Tensor) -> Firings:
    f = sae.own_latents(rows)
    row, latent = f.nonzero(as_tuple=True)
    return Firings(numbers[row.cpu()], latent.cpu(), f[row, latent].float().cpu())


def table(found: Found, data: ActivationDataModule, n_latents: int) -> list[list[str]]:
    """A row for each of the strongest contexts of some latents, evenly over their frequencies."""
    order = found.frequency.argsort(descending=True)
    order = order[found.frequency[order] > 0]
    if len(order) == 0:
        return []
    some = torch.linspace(0, len(order) - 1, min(n_latents, len(order))).round().long()
    shown, rows = order[some], []
    of_each = (found.of(t, shown) for t in (found.contexts.top_values, found.contexts.top_tokens))
    for latent, values, places in zip(shown.tolist(), *(t.tolist() for t in of_each), strict=True):
        for value, place in zip(values, places, strict=True):
            if place >= 0:
                frequency = f"{found.frequency[latent]:.5f}"
                rows.append([str(latent), frequency, f"{value:.2f}", _context(found, data, place)])
    return rows


def _context(found: Found, data: ActivationDataModule, place: int) -> str:
    block, at = found.blocks[place // data.context_length], place % data.context_length
    parts = (block[max(0, at - BEFORE) : at], block[at : at + 1], block[at + 1 : at + 1 + AFTER])
    before, token, after = ("".join(spelled(data, part.tolist())) for part in parts)
    return f"{before}«{token}»{after}"


def labels_of(
    found: Found, data: ActivationDataModule, latents: Int[Tensor, " n"]
) -> list[list[str]]:
    """Number, tokens and frequency of some latents."""
    n_own = len(found.contexts.top_values)
    tokens = found.of(found.on_tokens.first(n_own, N_LABELS)[0], latents)
    log_frequency = found.frequency[latents].clamp_min(0.5 / found.n_tokens).log10()
    return [
        [
            str(latent),
            " ".join(spelled(data, [token for token in own if token >= 0])) or "-",
            f"{frequency:.2f}",
        ]
        for latent, own, frequency in zip(
            latents.tolist(), tokens.tolist(), log_frequency.tolist(), strict=True
        )
    ]


def spelled(data: ActivationDataModule, tokens: Sequence[int]) -> list[str]:
    """Texts of tokens, each on one line."""
    texts = (
        data.language_model.tokenizer.decode([token if token >= 0 else ~token]) for token in tokens
    )
    return [text.replace("\n", "↵").replace("\r", "").replace("\t", "⇥") for text in texts]
