"""Write an analysis of an SAE to disk, and open it again.

A folder holds `latents.parquet` (a row for each latent), `latents.safetensors` (several numbers for
each latent: histograms, tokens, neighbours, logits), `contexts.safetensors` (token ids, and the
latent's activation on each of them), `tokens.json` (texts of the token ids that occur) and
`results.json` (settings, and figures of all latents together).
"""

import json
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_sae.files import write_atomically

TABLE, LATENTS, CONTEXTS = "latents.parquet", "latents.safetensors", "contexts.safetensors"
TOKENS, RESULTS = "tokens.json", "results.json"


class Example(NamedTuple):
    """A piece of text in which a latent fires.

    Attributes:
        tokens: Texts of its tokens.
        activations: The latent's activation on each of them, in raw units.
        at: Index of the token for which the piece was chosen.
        interval: 0 if it is one of the strongest; else it was drawn from all activations above half
            of the largest (1), a quarter (2), and so on.
    """

    tokens: list[str]
    activations: list[float]
    at: int
    interval: int


class FeatureStore:
    """The folder that `lightning-sae analyze` made, opened.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it is not such a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = [n for n in (TABLE, LATENTS, CONTEXTS) if not (self.folder / n).is_file()]
        if missing:
            raise ValueError(
                "Expected argument `folder` to be one that `lightning-sae analyze` made but "
                f"{self.folder} lacks {', '.join(missing)}: run the analysis first."
            )

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each latent; the index is the latent's number."""
        return pd.read_parquet(self.folder / TABLE)

    @cached_property
    def results(self) -> dict[str, Any]:
        """Settings of the analysis, and figures over all latents."""
        return json.loads((self.folder / RESULTS).read_text())

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        """Arrays with several numbers for each latent, by name, each [d_sae, n]."""
        return load_file(self.folder / LATENTS)

    @cached_property
    def _contexts(self) -> dict[str, Tensor]:
        return load_file(self.folder / CONTEXTS)

    @cached_property
    def _texts(self) -> dict[str, str]:
        return json.loads((self.folder / TOKENS).read_text())

    def text(self, token: int) -> str:
        """The text of a token id."""
        return self._texts.get(str(token), f"[{token}]")

    def where(self, condition: str) -> pd.DataFrame:
        """Rows of the table for which a condition holds, as `pandas.DataFrame.query` takes it.

        Example: `store.where("frequency < 1e-4 and kurtosis > 10")`.
        """
        return self.table.query(condition)

    def examples(self, latent: int) -> list[Example]:
        """Pieces of text in which a latent fires: the strongest, then some of every interval.

        Raises:
            ValueError: If there is no such latent.
        """
        self._require(latent)
        contexts = self._contexts
        start, end = contexts["starts"][latent : latent + 2].tolist()
        largest = float(self.table["maximum"][latent])
        found = []
        for i in range(start, end):
            ids, shares = contexts["tokens"][i], contexts["shares"][i]
            inside = ids >= 0
            found.append(
                Example(
                    [self.text(token) for token in ids[inside].tolist()],
                    [share * largest for share in shares[inside].tolist()],
                    int(contexts["at"]) - int(inside.int().argmax()),
                    int(contexts["interval"][i]),
                )
            )
        return found

    def latent(self, latent: int) -> "Latent":
        """One latent; displays itself in a notebook."""
        self._require(latent)
        return Latent(self, latent)

    def _require(self, latent: int) -> None:
        if not 0 <= latent < len(self.table):
            raise ValueError(
                f"Expected argument `latent` to be from 0 to {len(self.table) - 1} but got "
                f"{latent}."
            )


class Latent(NamedTuple):
    """A latent of a `FeatureStore`.

    Attributes:
        store: The store that holds it.
        number: Its index.
    """

    store: FeatureStore
    number: int

    @property
    def statistics(self) -> dict[str, float]:
        """Its row of the table."""
        return self.store.table.loc[self.number].to_dict()

    def tokens(self, name: str) -> list[tuple[str, float]]:
        """Token texts with a number: `fires_on`, `raised` or `lowered`."""
        values = {"fires_on": "fires_on_mean", "raised": "raised_by", "lowered": "lowered_by"}[name]
        if name not in self.store.arrays:
            return []
        ids = self.store.arrays[name][self.number].tolist()
        numbers = self.store.arrays[values][self.number].tolist()
        return [(self.store.text(i), x) for i, x in zip(ids, numbers, strict=True) if i >= 0]

    def _repr_html_(self) -> str:
        shown = ("frequency", "mean", "maximum", "encoder_decoder_cosine", "kurtosis")
        row = self.statistics
        figures = ", ".join(f"{name} {row[name]:.4g}" for name in shown)
        lines = [shaded(example, row["maximum"]) for example in self.store.examples(self.number)]
        return f"<h4>Latent {self.number}</h4><p>{figures}</p>" + "".join(lines)


def shaded(example: Example, largest: float) -> str:
    """A piece of text as HTML, tokens shaded by activation."""
    spans = []
    for i, (text, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        strength = value / largest if largest > 0 else 0.0
        weight = ";font-weight:bold" if i == example.at else ""
        style = f"background:rgba(255,140,0,{strength:.2f}){weight}"
        shown = escape(text).replace("\n", "↵")
        spans.append(f'<span style="{style}" title="{value:.4g}">{shown}</span>')
    return f'<pre style="margin:2px;white-space:pre-wrap">{"".join(spans)}</pre>'


def write_store(
    folder: Path,
    table: dict[str, Tensor],
    arrays: dict[str, Tensor],
    contexts: dict[str, Tensor],
    texts: dict[int, str],
    results: dict[str, Any],
) -> None:
    """Write all parts of an analysis; the module's docstring describes them.

    Args:
        folder: The folder to write to.
        table: Columns [d_sae] of `latents.parquet`.
        arrays: Tensors [d_sae, n] of `latents.safetensors`.
        contexts: `tokens` and `shares` [contexts, length], `interval` [contexts], `starts`
            [d_sae + 1] (the contexts of latent j are `starts[j]:starts[j + 1]`) and `at`, the place
            in a context of the token for which it was chosen.
        texts: Texts of token ids.
        results: Plain values.
    """
    frame = pd.DataFrame({name: column.numpy() for name, column in table.items()})
    frame.index.name = "latent"
    write_atomically(folder / TABLE, lambda path: frame.to_parquet(path))
    for name, tensors in ((LATENTS, arrays), (CONTEXTS, contexts)):
        own = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_atomically(folder / name, partial(save_file, own))
    for name, content in ((TOKENS, texts), (RESULTS, results)):
        text = json.dumps(content, indent=1, ensure_ascii=False).encode()
        write_atomically(folder / name, partial(Path.write_bytes, data=text))
