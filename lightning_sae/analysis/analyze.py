"""`lightning-sae analyze`: look inside a trained SAE."""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_sae.analysis import weights
from lightning_sae.analysis.rare_latents import furthest_inputs, rare_directions
from lightning_sae.analysis.reading import AFTER, BEFORE, ContextReader, FiringReader
from lightning_sae.analysis.site.writer import write_page, write_site
from lightning_sae.analysis.store import FeatureStore, write_store
from lightning_sae.analysis.unembedding import null_space_matrix, unembedding_of
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import expect, require_new_folder, require_positive
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.files import written_whole
from lightning_sae.functional.peaks import two_peaks
from lightning_sae.loading import load
from lightning_sae.training.compatibility import warn_of_other_activations

QUANTILES = (0.5, 0.9, 0.99)
HISTOGRAM_BINS = 40
TOKENS_FOR_RARE = 100_000
SHORT = "Analyze a trained SAE: what each latent fires on, its weights, and the logits it raises."
TAKEN_OVER = (
    *("head", "context_length", "drop_special_tokens", "positions", "max_norm_multiple"),
    *("text", "text_column", "document_start", "separator", "pack", "keep_rest", "chat_roles"),
)
"""Keys of an SAE's `source` that are arguments of `ActivationDataModule`."""


def analyze(
    sae: str,
    output: str,
    *,
    tokens: int = 1_000_000,
    model: str | None = None,
    hook_name: str | None = None,
    text: str | list[str] | None = None,
    text_column: str | None = None,
    streaming: bool = False,
    context_length: int | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    latents: list[int] | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    seed: int = 0,
) -> Path:
    """Analyze a trained SAE: what each latent fires on, its weights, and the logits it raises.

    Model, hook, text, context and filter default to those that the SAE was trained with. Special
    tokens and outliers are left out as in training.

    Args:
        sae: Folder that `save_pretrained` wrote, or a checkpoint.
        output: New folder for the results; opened by `lightning_sae.FeatureStore`.
        tokens: Approximate number of tokens to read.
        model: Folder or hub name of the language model.
        hook_name: Its hook.
        text: Text to read.
        text_column: Name of the text column, if the text has columns.
        streaming: Read a hub data set as a stream.
        context_length: Tokens in a block.
        accelerator: As Lightning's `Trainer` takes it.
        devices: Number of devices; each reads its share.
        latents: Latents to also write into one self-contained page, `latents.html`.
        precision: As Lightning's `Trainer` takes it.
        seed: Seed of the random baselines.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no such SAE, its model is unknown, or `output` is not empty.
    """
    folder = Path(output)
    require_new_folder("output", folder)
    require_positive(tokens=tokens)
    trained = load(sae)
    for latent in latents or ():
        within = f"from 0 to {trained.d_sae - 1}"
        expect(0 <= latent < trained.d_sae, "latents", within, latent)
    given = {
        "model": model,
        "hook_name": hook_name,
        "text": text,
        "context_length": context_length,
    }
    data = data_of(
        trained, {k: v for k, v in given.items() if v is not None}, text_column, streaming
    )
    _require_fit(trained, data)
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    reader, contexts = _read(trainer, trained, data, tokens)
    if trainer.is_global_zero:
        seconds = time.perf_counter() - started
        with written_whole(folder) as new:
            _write(new, trained, data, reader, contexts, seed, seconds)
            _write_pages(new, latents)
    trainer.strategy.barrier()  # a rank that exits early would stop the others
    return folder


def _write_pages(folder: Path, latents: Sequence[int] | None) -> None:
    store = FeatureStore(folder)
    write_site(store)
    if latents:
        write_page(store, latents, folder / "latents.html")


def _require_fit(sae: SparseAutoencoder, data: ActivationDataModule) -> None:
    """Raise a ValueError if activations have another width, warn if they are of another kind."""
    if data.d_in != sae.d_in:
        raise ValueError(
            f"Expected activations of width {sae.d_in}, for which the SAE was made, but "
            f"`{data.hook_name}` gives {data.d_in}: choose the model and hook of the SAE."
        )
    warn_of_other_activations(sae.source, data.source)


def _read(
    trainer: Trainer, sae: SparseAutoencoder, data: ActivationDataModule, tokens: int
) -> tuple[FiringReader, ContextReader]:
    """Read the text on all ranks, then the contexts that were chosen from it."""
    reader, broadcast = FiringReader(sae, data, tokens), trainer.strategy.broadcast
    trainer.predict(reader, return_predictions=False)
    chosen, text = broadcast(reader.contexts.chosen()), broadcast(reader.text())
    contexts = ContextReader(sae, data, text, chosen, broadcast(reader.strengths.largest))
    trainer.predict(contexts, return_predictions=False)
    return reader, contexts


def data_of(
    sae: SparseAutoencoder,
    given: dict[str, Any],
    text_column: str | None = None,
    streaming: bool = False,
    validation_fraction: float = 0.0,
) -> ActivationDataModule:
    """The data that an SAE was trained on, with changed settings if given; by default all of it.

    Raises:
        ValueError: If neither the SAE nor the arguments name the model, the hook or the text.
    """
    own = {k: v for k, v in sae.source.items() if k in ("model", "hook_name", *TAKEN_OVER)}
    # For `auto`, the source also states the choice: "auto (bos before texts)".
    known: dict[str, Any] = {
        k: "auto" if str(v).startswith("auto (") else v for k, v in own.items()
    } | given
    if text_column is not None:
        known["text_column"] = text_column
    revision = sae.source.get("model_revision")
    if revision is not None and "model" not in given:
        known["model_kwargs"] = {"revision": revision}
    missing = [name for name in ("model", "hook_name", "text") if not known.get(name)]
    if missing or known["model"] == "toy":
        raise ValueError(
            f"Expected the SAE to name a language model, its hook and text but it names "
            f"{sae.source or 'nothing'}: give {', '.join(f'`{n}`' for n in missing or ['model'])}."
        )
    return ActivationDataModule(
        known.pop("hook_name"),
        known.pop("model"),
        **known,
        streaming=streaming,
        validation_fraction=validation_fraction,
    )


def _write(
    folder: Path,
    sae: SparseAutoencoder,
    data: ActivationDataModule,
    reader: FiringReader,
    contexts: ContextReader,
    seed: int,
    seconds: float,
) -> None:
    sae, model, strengths = sae.cpu(), data.language_model, reader.strengths
    histogram = strengths.histogram(HISTOGRAM_BINS)
    table = _table(sae, model, reader, histogram)
    arrays = {"histogram": histogram, **_partners(sae, reader)}
    unembedding = unembedding_of(model)
    if unembedding is not None:
        through = unembedding.to_residual
        through = None if through is None else through.cpu()
        arrays |= weights.logit_weights(sae.W_dec.detach(), through, unembedding.matrix.cpu(), 10)
    own = _contexts(sae, contexts)
    results = {
        "source": data.source,
        "sae": {"architecture": type(sae).__name__, "d_in": sae.d_in, "d_sae": sae.d_sae},
        "tokens": strengths.n_tokens,
        "left_out": reader.left_out,
        "seconds": seconds,
        "context": {"before": BEFORE, "after": AFTER},
        "logits": None if unembedding is None else unembedding.note,
        **_population(sae, table, seed),
        "rare_latents": _rare_latents(sae, table["rare"], data, strengths.n_tokens),
    }
    write_store(folder, table, arrays, own, _texts(model.tokenizer, own, arrays), results)


def _table(
    sae: SparseAutoencoder, model: LanguageModel, reader: FiringReader, histogram: Tensor
) -> dict[str, Tensor]:
    """The columns of `latents.parquet`, one value per latent."""
    strengths, peaks = reader.strengths, two_peaks(histogram)
    table: dict[str, Tensor] = {
        "frequency": strengths.frequency(),
        "firings": strengths.count,
        "mean": strengths.mean(),
        "std": strengths.std(),
        "maximum": strengths.largest,
        **{f"quantile_{q:g}": strengths.quantile(q) for q in QUANTILES},
        "peaks": peaks.found.long() + (strengths.count > 0).long(),
        "separation": peaks.separation,
        **weights.latent_geometry(sae),
        "rare": weights.rare_cluster(strengths.frequency()),
    }
    matrix = null_space_matrix(model)
    if matrix is not None:
        table["null_space"] = weights.null_space_share(sae.W_dec.detach(), matrix.cpu())
    return table


def _contexts(sae: SparseAutoencoder, contexts: ContextReader) -> dict[str, Tensor]:
    """The contexts of all latents, sorted by latent; `starts` is where each latent's begin."""
    latents = torch.arange(sae.d_sae + 1)
    return {
        "tokens": contexts.tokens,
        "shares": contexts.shares,
        "interval": contexts.chosen["interval"].int(),
        "starts": torch.searchsorted(contexts.chosen["latent"], latents),
        "at": torch.tensor(BEFORE),
    }


def _partners(sae: SparseAutoencoder, reader: FiringReader) -> dict[str, Tensor]:
    fires_on, counts, means = reader.on_tokens.first(sae.d_sae, 10)
    partners, together, _ = reader.on_latents.first(sae.d_sae, 8)
    neighbours, cosines = weights.nearest(sae.W_dec.detach(), 8)
    return {
        "fires_on": fires_on,
        "fires_on_count": counts,
        "fires_on_mean": means,
        "partners": partners,
        "partner_count": together,
        "neighbours": neighbours,
        "neighbour_cosine": cosines,
    }


def _population(sae: SparseAutoencoder, table: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Figures over all latents, and those of random rows of the same shape."""
    rows, random = sae.W_dec.detach(), weights.baseline(sae.d_sae, sae.d_in, seed)
    frequent = table["frequency"] > 1e-4
    of_random = {**weights.neuron_sparsity(random), "kurtosis": weights.excess_kurtosis(random)}
    return {
        "dead": float((table["firings"] == 0).float().mean()),
        "l0": float(table["frequency"].sum()),
        "rare": int(table["rare"].sum()),
        "columns": {name: weights.summary(column) for name, column in table.items()},
        "random_rows": {name: weights.summary(column) for name, column in of_random.items()},
        "pairwise_cosine": weights.summary(weights.pairwise_cosines(rows[frequent], seed)),
        "random_pairwise_cosine": weights.summary(weights.pairwise_cosines(random, seed)),
    }


def _rare_latents(
    sae: SparseAutoencoder, rare: Tensor, data: ActivationDataModule, n_tokens: int
) -> dict[str, Any] | None:
    """The common direction of rare latents, and the inputs furthest along it; None without them.

    For the inputs, part of the text is read again, because rare latents are known only at its end.
    """
    if not rare.any():
        return None
    inputs = furthest_inputs(sae, rare, data, min(n_tokens, TOKENS_FOR_RARE))
    figures = {k: v if math.isfinite(v) else None for k, v in rare_directions(sae, rare).items()}
    return {**figures, "inputs": [each._asdict() for each in inputs]}


def _texts(
    tokenizer: Any, contexts: dict[str, Tensor], arrays: dict[str, Tensor]
) -> dict[int, str]:
    """Text of each token id that occurs."""
    lists = [arrays[name] for name in ("fires_on", "raised", "lowered") if name in arrays]
    ids = torch.cat([contexts["tokens"].long().flatten(), *(each.flatten() for each in lists)])
    return {token: tokenizer.decode([token]) for token in ids.unique().tolist() if token >= 0}


def main(args: list[str]) -> None:
    """Run `lightning-sae analyze`."""
    parser = ArgumentParser(prog="lightning-sae analyze", description=SHORT)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these arguments")
    parser.add_argument("sae", help="folder that `save_pretrained` wrote, or a checkpoint")
    parser.add_function_arguments(analyze, skip={"sae"})
    given = parser.parse_args(args).as_dict()
    given.pop("config")
    _tell(analyze(**given))


@rank_zero_only
def _tell(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    sys.stdout.write(
        f"\nRead {results['tokens']:,} tokens in {results['seconds']:.0f} s. Made:\n"
        f"  {folder}  tables, contexts and figures of {results['sae']['d_sae']:,} latents\n"
        f"  {folder / 'index.html'}  all of it for a browser, works offline\n"
        "In Python:\n"
        f"  lightning_sae.FeatureStore({str(folder)!r}).table\n"
    )
