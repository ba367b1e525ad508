"""Write a `FeatureStore` as web pages that open from disk, without a network or a server.

Browsers do not let a page opened from disk read other files, but they run scripts beside it. So
`table.js` holds the table of all latents, and `latents/0.js`, `latents/1.js`, ... hold the rest,
`CHUNK` latents each, and are loaded when one of them is viewed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lightning_sae.analysis.store import Example, FeatureStore
from lightning_sae.files import write_atomically

HERE = Path(__file__).parent
CHUNK = 16
COLUMNS = (
    "frequency",
    "firings",
    "maximum",
    "mean",
    "std",
    "quantile_0.5",
    "quantile_0.99",
    "peaks",
    "separation",
    "encoder_decoder_cosine",
    "projection",
    "encoder_bias",
    "decoder_norm",
    "top_1",
    "next_9",
    "kurtosis",
    "null_space",
)
"""Columns of the table that the pages show, if present."""


def write_site(store: FeatureStore) -> Path:
    """Write `index.html` and the files that it loads into the folder of an analysis."""
    folder, d_sae = store.folder, len(store.table)
    _write(folder / "table.js", _table(store, range(d_sae)))
    for chunk in range(math.ceil(d_sae / CHUNK)):
        own = range(chunk * CHUNK, min(d_sae, (chunk + 1) * CHUNK))
        _write(folder / "latents" / f"{chunk}.js", _latents(store, own))
    page = _page(store, sources=["table.js"], inline=[])
    return _write(folder / "index.html", page)


def write_page(store: FeatureStore, latents: Sequence[int], path: Path) -> Path:
    """Write one self-contained page of some latents.

    Raises:
        ValueError: If there is no such latent.
    """
    for latent in latents:
        store.latent(latent)  # raises if one is out of range
    inline = [_table(store, latents), _latents(store, latents)]
    return _write(path, _page(store, sources=[], inline=inline))


def table_of(store: FeatureStore, latents: Sequence[int]) -> dict[str, Any]:
    """The table of latents: columns of figures, and the tokens that each latent fires on."""
    rows = store.table.loc[list(latents)]
    names = [name for name in COLUMNS if name in rows]
    return {
        "latent": list(latents),
        "columns": {name: [_rounded(x) for x in rows[name].tolist()] for name in names},
        "tokens": [[text for text, _ in store.latent(i).tokens("fires_on")[:5]] for i in latents],
    }


def latent_of(store: FeatureStore, number: int) -> dict[str, Any]:
    """Everything that the panel of a latent shows beside its row of the table."""
    latent, arrays = store.latent(number), store.arrays
    largest = float(store.table["maximum"][number])
    counts = arrays["fires_on_count"][number].tolist()
    texts = [text for text, _ in latent.tokens("fires_on")]
    found: dict[str, Any] = {
        "histogram": [round(x) for x in arrays["histogram"][number].tolist()],
        "fires_on": list(zip(texts, counts, strict=False)),
        "neighbours": _pairs(arrays["neighbours"][number], arrays["neighbour_cosine"][number]),
        "partners": _pairs(arrays["partners"][number], arrays["partner_count"][number]),
        "contexts": [_context(example, largest) for example in store.examples(number)],
    }
    if "raised" in arrays:
        for name in ("raised", "lowered"):
            found[name] = [(text, _rounded(x)) for text, x in latent.tokens(name)]
    return found


def _pairs(numbers: Any, values: Any) -> list[tuple[int, float | int | None]]:
    both = zip(numbers.tolist(), values.tolist(), strict=True)
    return [(number, _rounded(value)) for number, value in both if number >= 0]


def _context(example: Example, largest: float) -> dict[str, Any]:
    shares = [round(255 * min(1.0, x / largest)) if largest else 0 for x in example.activations]
    own = {"tokens": example.tokens, "shares": shares}
    return {**own, "at": example.at, "interval": example.interval}


def _table(store: FeatureStore, latents: Sequence[int]) -> str:
    return f"window.SAE.chunk = {CHUNK}; window.SAE.table = {_script(table_of(store, latents))};"


def _latents(store: FeatureStore, latents: Sequence[int]) -> str:
    content = {number: latent_of(store, number) for number in latents}
    return f"Object.assign(window.SAE.latents, {_script(content)});"


def _rounded(x: Any) -> float | int | None:
    """A number with four digits; None (null in JSON) if it is not finite."""
    if isinstance(x, int):
        return int(x)
    return float(f"{x:.4g}") if math.isfinite(x) else None


def _script(content: Any) -> str:
    """JSON that cannot end the script that contains it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _page(store: FeatureStore, sources: list[str], inline: list[str]) -> str:
    results = store.results
    source, sae = results["source"], results["sae"]
    environment = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined)
    escape = Environment(autoescape=True).from_string("{{ text }}").render
    title = f"{sae['architecture']}, {sae['d_sae']:,} latents, {source['hook_name']}"
    about = (
        f"{results['tokens']:,} tokens of {source['text']} through {source['model']}; L0 "
        f"{results['l0']:.1f}, {results['dead']:.1%} of latents never fired. "
        f"{results['left_out']:,} tokens were left out, as in training (special tokens, positions, "
        f"outliers). Logits: {results['logits'] or 'not available at this hook'}."
    )
    return environment.get_template("page.html.jinja").render(
        title=escape(text=title),
        about=escape(text=about),
        rare=results.get("rare_latents"),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        sources=sources,
        inline=inline,
    )


def _write(path: Path, text: str) -> Path:
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))
    return path
