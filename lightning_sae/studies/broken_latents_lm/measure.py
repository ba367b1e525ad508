"""Figures of SAEs on a language model: absorption, probing, peaks, and what the loss is made of."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.analysis.evaluation import evaluate_saes, flat, questions_of, read_passages
from lightning_sae.analysis.evaluation.figures import Questions
from lightning_sae.analysis.evaluation.sample import Sample, latents_of, read_sample
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.functional.peaks import LEAST_COUNT, two_peaks
from lightning_sae.studies.broken_latents_lm.settings import SHARE
from lightning_sae.studies.shared.peaks import PEAK_BINS, count_peaks, histogram, overlap
from lightning_sae.studies.shared.rows import Row

BINS = 64  # of the histograms that two components are fitted to, as in training
ROWS = 8192  # activations for the parts of the loss
SHOWN_BINS = 40  # of the histograms in pictures


def asked(data: ActivationDataModule, n_tokens: int) -> Questions:
    """The properties to probe, of held-out text."""
    passages = read_passages(data, n_tokens, max(data.context_length, n_tokens // 32))
    return questions_of(passages, data.context_length)


def measure(
    saes: Mapping[str, SparseAutoencoder],
    data: ActivationDataModule,
    questions: Questions,
    n_tokens: int,
) -> dict[str, Row]:
    """Figures of SAEs at one hook, by name.

    Args:
        saes: The SAEs, which act on raw activations.
        data: Gives the language model and held-out text.
        questions: The properties to probe.
        n_tokens: Held-out tokens for L0, FVU and cross-entropy.

    Returns:
        `l0`, `fvu`, `dead` and `ce_added`; `absorbed` and `in_full`, mean absorption fraction and
        full absorption, and `own`, latents for a property; `token_1` and `token_5`, mean accuracy
        of probes on latents; the figures of `peaks_of`, `parts_of` and `overlaps_of`; and
        `properties`, absorption, overlap and histograms of each property.
    """
    evaluated, _ = evaluate_saes(saes, data, questions, n_tokens=n_tokens)
    sample = read_sample(data, questions.blocks)
    return {name: _figures(sae, evaluated[name], sample, questions) for name, sae in saes.items()}


def _figures(
    sae: SparseAutoencoder, evaluated: Mapping[str, Any], sample: Sample, questions: Questions
) -> Row:
    flattened = flat(evaluated)
    names = {
        "l0": "l0",
        "fvu": "fvu",
        "dead": "dead_fraction",
        "ce_added": "ce_added",
        "absorbed": "absorption_fraction",
        "in_full": "absorption_full",
        "own": "latents_per_property",
        "token_1": "probing_token_1",
        "token_5": "probing_token_5",
    }
    row: Row = {ours: flattened.get(theirs) for ours, theirs in names.items()}
    latents = latents_of(sae, sample.x)
    properties = overlaps_of(latents, evaluated["absorption"], sample, questions)
    overlaps = [each["overlap"] for each in properties.values()]
    return {
        **row,
        **peaks_of(latents),
        **parts_of(sae, sample.x[:ROWS]),
        "overlap": mean(overlaps) if overlaps else None,
        "properties": properties,
    }


def peaks_of(latents: Any) -> Row:
    """Peaks of latents' activations, over latents that fire at least 100 times.

    Args:
        latents: Sparse matrix [n, d_sae].

    Returns:
        `two_peaks`, the share of latents that `MixtureThreshold` would give a valley; `separation`,
        the median of Ashman's D where two components fit; `dips`, the share of latents with several
        peaks by `count_peaks` of the toy study, which asks for a dip to half; `below_share`, the
        median share of a latent's firings that are up to .7 of its largest; `below_valley`, the
        median share below the valley, where there is one.
    """
    columns = latents.tocsc()
    fired = [
        torch.from_numpy(columns.data[start:end]).float()
        for start, end in zip(columns.indptr, columns.indptr[1:], strict=False)
        if end - start >= LEAST_COUNT
    ]
    if not fired:
        return {"two_peaks": None, "separation": None, "dips": None, "below_share": None}
    fitted = two_peaks(torch.stack([histogram(f, BINS) for f in fired]))
    dips = [count_peaks(histogram(f, PEAK_BINS)) > 1 for f in fired]
    valleys = [
        float((f <= crossing * f.max()).double().mean())
        for f, crossing, found in zip(fired, fitted.crossing, fitted.found, strict=True)
        if found
    ]
    separations = fitted.separation[fitted.separation > 0].tolist()
    return {
        "two_peaks": float(fitted.found.double().mean()),
        "separation": median(separations) if separations else None,
        "dips": mean(map(float, dips)),
        "below_share": median(float((f <= SHARE * f.max()).double().mean()) for f in fired),
        "below_valley": median(valleys) if valleys else None,
    }


@torch.no_grad()
def parts_of(sae: SparseAutoencoder, x: Float[Tensor, "n d_in"]) -> Row:
    """What the auxiliary loss with a threshold of .7 of the largest activation is made of.

    Args:
        sae: The SAE.
        x: Raw activations.

    Returns:
        `cos2`, the loss without its weight; `of_silent` and `of_weak`, the shares of it that are
        from pairs in which the latent is silent, and in which it fires up to the threshold; and
        `opposite`, the share from silent pairs with a negative cosine.
    """
    f = sae.encode(x)
    cosines = unit_rows(sae.encoder_input(sae.scaled(x))) @ unit_rows(sae.W_enc.T).T
    squares = cosines.square()
    silent = f <= 0
    weak = ~silent & (f <= SHARE * f.amax(0))
    total = float((squares * (silent | weak)).sum())
    shares = {
        "of_silent": silent,
        "of_weak": weak,
        "opposite": silent & (cosines < 0),
    }
    return {
        "cos2": total / squares.numel(),
        **{name: float((squares * mask).sum()) / total for name, mask in shares.items()},
    }


def overlaps_of(
    latents: Any, absorbed: Mapping[str, Row], sample: Sample, questions: Questions
) -> dict[str, Row]:
    """The activations of each property's own latent, on tokens with it and without it.

    Args:
        latents: Sparse matrix [n, d_sae].
        absorbed: Absorption by property, as of `evaluate_saes`; the first own latent is taken.
        sample: The tokens.
        questions: Labels of all tokens.

    Returns:
        By property: `fraction` and `full`; `latent`; `overlap`, the common area of the
        distributions of its activations with the property and without it, silent tokens left out;
        `fires_with` and `fires_without`, the shares of tokens on which it fires; `of_property`,
        the share of its firings that have the property, of its strongest tenth `of_top`, and of
        those up to .7 of its largest activation `of_low`; `top`, this activation; and
        `with_property` and `without`, histograms up to it.
    """
    columns, found = latents.tocsc(), {}
    for name, own in absorbed.items():
        labels = questions.of_tokens[name][sample.token]
        f = torch.from_numpy(columns[:, own["latents"][0]].toarray()[:, 0]).float()
        f, has = f[labels >= 0], labels[labels >= 0] == 1
        fires, top = f > 0, float(f.max())
        if top <= 0:
            continue
        tenth = f >= f[fires].quantile(0.9)
        sides = [f[has & fires], f[~has & fires]]
        counts = [torch.histc(side, SHOWN_BINS, 0.0, top).tolist() for side in sides]
        found[name] = {
            "fraction": own["fraction"],
            "full": own["full"],
            "latent": own["latents"][0],
            "overlap": overlap(f, has),
            "fires_with": _share(fires[has]),
            "fires_without": _share(fires[~has]),
            "of_property": _share(has[fires]),
            "of_top": _share(has[tenth]),
            "of_low": _share(has[fires & (f <= SHARE * top)]),
            "top": top,
            "with_property": counts[0],
            "without": counts[1],
        }
    return found


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if len(which) else 0.0


def scalars(rows: Sequence[Row]) -> list[Row]:
    """Rows without what has a figure for each property."""
    return [{name: value for name, value in row.items() if name != "properties"} for row in rows]
