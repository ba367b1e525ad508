"""`lightning-sae compare`: how many latents two SAEs share, as a measure of stability.

Each latent of the smaller SAE is matched with one of the other so that the sum of cosines is
largest (Hungarian algorithm). Random directions of the same shape are matched in the same way as a
baseline: in few dimensions, cosines are high by chance.
"""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from torch import Tensor

from lightning_sae.analysis.analyze import data_of
from lightning_sae.analysis.rare_latents import mean_direction
from lightning_sae.analysis.weights import baseline, rare_cluster
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import require_new_folder
from lightning_sae.data import ActivationDataModule
from lightning_sae.files import write_atomically, written_whole
from lightning_sae.functional.assignment import optimal_matching
from lightning_sae.functional.matching import cosine_matrix
from lightning_sae.loading import load

SHARES = (0.7, 0.9)
SHORT = "Compare SAEs: which latents have a partner, and do partners fire alike?"


def matched(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """The best one-to-one matching of the rows of two matrices by cosine.

    Returns:
        Indices of rows of `a` and of `b`, and their cosines; each [min(len(a), len(b))].
    """
    cosines = cosine_matrix(a, b)
    rows, columns = optimal_matching(cosines)
    return rows, columns, cosines[rows, columns]


@torch.no_grad()
def compare_weights(a: SparseAutoencoder, b: SparseAutoencoder, seed: int = 0) -> dict[str, Any]:
    """Match the decoder rows of two SAEs, and compare with random rows.

    Returns:
        `pairs` (latents of a and of b), `decoder` and `encoder`, the cosines of these pairs,
        `random`, the cosines of equally many matched random rows; and `figures`: means, and
        the shares of pairs above .7 and .9.

    Raises:
        ValueError: If the SAEs have different `d_in`.
    """
    if a.d_in != b.d_in:
        raise ValueError(
            f"Expected SAEs of the same `d_in` but got {a.d_in} and {b.d_in}: compare SAEs of one "
            "model and hook."
        )
    rows, columns, decoder = matched(a.W_dec, b.W_dec)
    encoder = torch.cosine_similarity(a.W_enc.T[rows], b.W_enc.T[columns], dim=-1)
    random_rows = (baseline(len(sae.W_dec), a.d_in, seed + i) for i, sae in enumerate((a, b)))
    random = matched(*random_rows)[2]
    cosines = {"decoder": decoder, "encoder": encoder, "random": random}
    figures = {f"{name}_mean": float(values.mean()) for name, values in cosines.items()}
    for name, values in cosines.items():
        figures |= {f"{name}_above_{s:g}": float((values > s).float().mean()) for s in SHARES}
    return {"pairs": torch.stack([rows, columns], 1), **cosines, "figures": figures}


class OnText(NamedTuple):
    """Activations of two SAEs compared on the same text.

    Attributes:
        correlation: Correlation of matched latents' activations, [pairs]; NaN if one is constant.
        frequencies: How often each latent fires, for both SAEs.
    """

    correlation: Float[Tensor, " pairs"]
    frequencies: tuple[Float[Tensor, " m"], Float[Tensor, " n"]]


@torch.no_grad()
def on_text(
    a: SparseAutoencoder,
    b: SparseAutoencoder,
    pairs: Tensor,
    data: ActivationDataModule,
    n_tokens: int,
) -> OnText:
    """Compare two SAEs, with latents matched by `pairs`, on about `n_tokens` tokens."""
    sums = torch.zeros(5, len(pairs), dtype=torch.float64)
    fired = torch.zeros(a.d_sae), torch.zeros(b.d_sae)
    n, blocks = 0, data.training_blocks()
    while n < n_tokens:
        tokens = blocks.read_first_epoch(data.blocks_per_pass)
        if len(tokens) == 0:
            break
        x = data.language_model.activations(tokens)
        x = x[data.filter.kept(tokens, x).to(x.device)].float().cpu()
        latents = a.encode(x), b.encode(x)
        for count, own in zip(fired, latents, strict=True):
            count += (own > 0).sum(0)
        f, g = (own[:, pairs[:, i]].double() for i, own in enumerate(latents))
        sums += torch.stack([f.sum(0), g.sum(0), (f * f).sum(0), (g * g).sum(0), (f * g).sum(0)])
        n += len(x)
    f, g, ff, gg, fg = sums / max(n, 1)
    correlation = (fg - f * g) / ((ff - f * f) * (gg - g * g)).sqrt()
    return OnText(correlation, (fired[0] / max(n, 1), fired[1] / max(n, 1)))


@torch.no_grad()
def compare_rare(
    a: SparseAutoencoder,
    b: SparseAutoencoder,
    frequencies: tuple[Float[Tensor, " m"], Float[Tensor, " n"]],
) -> dict[str, float]:
    """Whether the rare latents of two SAEs share a direction: see `rare_latents`.

    Returns:
        `rare_a`, `rare_b`, the numbers of rare latents; and if both have some,
        `rare_direction_cosine`, the cosine of their mean encoder directions.
    """
    rare = [rare_cluster(frequency) for frequency in frequencies]
    found = {f"rare_{name}": float(mask.sum()) for name, mask in zip("ab", rare, strict=True)}
    if all(found.values()):
        one, other = (
            mean_direction(sae.W_enc.T[mask]) for sae, mask in zip((a, b), rare, strict=True)
        )
        found["rare_direction_cosine"] = float(one @ other)
    return found


def compare(saes: list[str], output: str, *, tokens: int = 100_000, seed: int = 0) -> Path:
    """Compare SAEs with each other: which latents have a partner, and do partners fire alike?

    Args:
        saes: Two or more folders that `save_pretrained` wrote, or checkpoints, all of the same
            hook.
        output: New folder for `compare.json`, `compare.png` and the pairs.
        tokens: Number of tokens for the correlation of matched latents; 0 skips it.
        seed: Seed of the random baseline.

    Returns:
        The folder.

    Raises:
        ValueError: If there are fewer than two SAEs, their widths differ, or `output` is not empty.
    """
    folder = Path(output)
    require_new_folder("output", folder)
    if len(saes) < 2:
        raise ValueError(f"Expected argument `saes` to be two or more but got {len(saes)}.")
    loaded = [load(path) for path in saes]
    found = []
    for i, j in combinations(range(len(saes)), 2):
        one = compare_weights(loaded[i], loaded[j], seed)
        if tokens:
            data = data_of(loaded[i], {})
            read = on_text(loaded[i], loaded[j], one["pairs"], data, tokens)
            varying = read.correlation[read.correlation.isfinite()]
            one["correlation"] = read.correlation
            one["figures"]["correlation_mean"] = float(varying.mean())
            one["figures"] |= compare_rare(loaded[i], loaded[j], read.frequencies)
        found.append({"a": saes[i], "b": saes[j], **one})
    with written_whole(folder) as new:
        _write(new, found)
    return folder


def _write(folder: Path, found: list[dict[str, Any]]) -> None:
    plain = [
        {name: part.tolist() if isinstance(part, Tensor) else part for name, part in one.items()}
        for one in found
    ]
    text = json.dumps(plain, indent=1).encode()
    write_atomically(folder / "compare.json", lambda path: path.write_bytes(text))
    figure = _drawn(found)
    write_atomically(folder / "compare.png", lambda path: figure.savefig(path, format="png"))


def _drawn(found: list[dict[str, Any]]) -> Figure:
    """Sorted cosines of matched latents, beside those of random rows."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, one in enumerate(found):
        name = f"{Path(one['a']).parent.name or one['a']} and {Path(one['b']).parent.name}"
        share = torch.linspace(0, 1, len(one["decoder"]))
        axes.plot(share, one["decoder"].sort(descending=True).values, label=name)
        if i == 0:
            random = one["random"].sort(descending=True).values
            axes.plot(share, random, color="grey", linestyle="--", label="random directions")
    axes.set(xlabel="share of matched latents", ylabel="cosine of decoder rows", ylim=(0, 1.02))
    axes.legend(frameon=False)
    return figure


def main(args: list[str]) -> None:
    """Run `lightning-sae compare`."""
    parser = ArgumentParser(prog="lightning-sae compare", description=SHORT)
    parser.add_argument("saes", nargs="+", help="folders or checkpoints of SAEs of one hook")
    parser.add_function_arguments(compare, skip={"saes"})
    folder = compare(**parser.parse_args(args).as_dict())
    for one in json.loads((folder / "compare.json").read_text()):
        figures = "".join(f"  {name:<22}{value:>9.4f}\n" for name, value in one["figures"].items())
        sys.stdout.write(f"\n{one['a']} and {one['b']}\n{figures}")
    sys.stdout.write(f"Made: {folder}/compare.json, compare.png\n")
