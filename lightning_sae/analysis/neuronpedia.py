"""The files that Neuronpedia's importer reads, from the folder of an analysis.

They are those of its `convert-saedashboard-to-neuronpedia-export.py`: for a source (an SAE of a
layer) `release.jsonl`, `model.jsonl`, `sourceset.jsonl`, `source.jsonl`, and in batches of 128
latents `features/batch-N.jsonl.gz` and `activations/batch-N.jsonl.gz`, with columns of the tables
`Neuron` and `Activation` of its database. Empty are columns of what an analysis does not have:
correlations with neurons and other latents, the histogram of logits, and vectors, for which
Neuronpedia loads the SAE itself.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sae.analysis.store import Example, FeatureStore
from lightning_sae.checks import expect
from lightning_sae.files import write_atomically, written_whole

PER_BATCH = 128
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The default user of Neuronpedia's own script."""
SITES = {"hook_resid_post": "res", "hook_resid_pre": "res", "hook_mlp_out": "mlp"}


class Source(NamedTuple):
    """Values shared by all rows of an SAE.

    Attributes:
        model_id: The model's name on Neuronpedia: letters, digits, `-` and `_`.
        set_name: Name of the set of SAEs of all layers.
        layer: Layer of this SAE.
        hook_name: Hook of this SAE.
        creator_name: Creator of the SAE.
        creator_id: The user of the database to whom it belongs.
        created_at: Time of creation, as ISO 8601.
    """

    model_id: str
    set_name: str
    layer: int
    hook_name: str
    creator_name: str
    creator_id: str
    created_at: str

    @property
    def id(self) -> str:
        """The source's id in Neuronpedia's addresses."""
        return f"{self.layer}-{self.set_name}"


def write_neuronpedia(
    store: FeatureStore,
    folder: str | Path,
    *,
    model_id: str | None = None,
    set_name: str | None = None,
    creator_name: str = "lightning-sae",
    creator_id: str = CREATOR_ID,
) -> Path:
    """Write an analysis in the format of Neuronpedia's importer.

    Args:
        store: The analysis.
        folder: A new folder; files go to `<folder>/<model_id>/<layer>-<set_name>`, which is the
            path below `v1/` in the importer's bucket.
        model_id: The model's name on Neuronpedia; by default the last part of its own.
        set_name: Name of the set of SAEs; by default site and width, such as `res-1024`.
        creator_name: Creator of the SAE.
        creator_id: The user of Neuronpedia's database to whom it belongs.

    Returns:
        The folder of the source.

    Raises:
        ValueError: If the SAE's hook is in no layer, a name has other signs than Neuronpedia takes,
            or the folder holds files.
    """
    known = store.results["source"]
    hook = str(known.get("hook_name", ""))
    layer = re.search(r"\.(\d+)\.", hook)
    if layer is None:
        raise ValueError(
            f"Expected the analysis of an SAE in a layer but its hook is {hook or 'not named'}: "
            "Neuronpedia sorts SAEs by layer."
        )
    name = Path(str(known.get("model", ""))).name.lower()
    model_id = model_id or re.sub(r"[^a-z0-9_-]", "-", name)
    site = SITES.get(hook.split(".")[-1], "att" if "attn" in hook else "mlp")
    set_name = set_name or f"{site}-{len(store.table)}"
    for argument, value in (("model_id", model_id), ("set_name", set_name)):
        plain = re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", value) is not None
        expect(plain, argument, "of letters, digits, - and _", repr(value))
    now = datetime.now(timezone.utc).replace(tzinfo=None).isoformat(timespec="milliseconds")
    source = Source(model_id, set_name, int(layer[1]), hook, creator_name, creator_id, now)
    root = Path(folder) / model_id / source.id
    expect(not root.exists(), "folder", "new", f"{root}, which exists: choose another folder")
    with written_whole(root) as new:
        _write(new, source, store)
    return root


def _write(folder: Path, source: Source, store: FeatureStore) -> None:
    for file, row in _about(source, store).items():
        _write_lines(folder / f"{file}.jsonl", [row])
    d_sae = len(store.table)
    for batch, first in enumerate(range(0, d_sae, PER_BATCH)):
        latents = range(first, min(d_sae, first + PER_BATCH))
        features = (_feature(source, store, latent) for latent in latents)
        activations = (row for latent in latents for row in _activations(source, store, latent))
        _write_lines(folder / "features" / f"batch-{batch}.jsonl.gz", features)
        _write_lines(folder / "activations" / f"batch-{batch}.jsonl.gz", activations)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text, 5, mtime=0)
    write_atomically(path, partial(Path.write_bytes, data=text))


def _about(source: Source, store: FeatureStore) -> dict[str, dict[str, Any]]:
    """The rows of the tables SourceRelease, Model, SourceSet and Source."""
    results = store.results
    kind, d_sae, known = results["sae"]["architecture"], len(store.table), results["source"]
    creator = {"creatorId": source.creator_id, "createdAt": source.created_at}
    title = f"{kind}, {d_sae} latents at {source.hook_name}"
    names = {"creatorName": source.creator_name, "visibility": "PUBLIC", "urls": []}
    release = {"name": source.set_name, "description": title, "descriptionShort": title}
    model = {
        "id": source.model_id,
        "displayName": source.model_id,
        "displayNameShort": source.model_id,
        "instruct": False,
        "layers": 0,
        "neuronsPerLayer": 0,
        "owner": "",
        "visibility": "PUBLIC",
        "updatedAt": source.created_at,
    }
    source_set = {
        "modelId": source.model_id,
        "name": source.set_name,
        "description": title,
        "releaseName": source.set_name,
    }
    text = known.get("text")
    length = known.get("context_length")
    row = {
        "id": source.id,
        "modelId": source.model_id,
        "setName": source.set_name,
        "visibility": "PUBLIC",
        "dataset": text if isinstance(text, str) else None,
        "num_prompts": round(results["tokens"] / length) if length else None,
        "num_tokens_in_prompt": length,
        "notes": "made by lightning-sae",
    }
    return {
        "release": {**release, **names, **creator},
        "model": {**model, **creator},
        "sourceset": {**source_set, **names, **creator},
        "source": {**row, **creator},
    }


def _feature(source: Source, store: FeatureStore, latent: int) -> dict[str, Any]:
    """A row of the table Neuron."""
    arrays, largest = store.arrays, float(store.table["maximum"][latent])
    heights = arrays["histogram"][latent].tolist()
    width = largest / len(heights)
    found = store.latent(latent)
    raised, lowered = found.tokens("raised"), found.tokens("lowered")
    return {
        "modelId": source.model_id,
        "layer": source.id,
        "index": str(latent),
        "sourceSetName": source.set_name,
        "creatorId": source.creator_id,
        "createdAt": source.created_at,
        "maxActApprox": _rounded(largest),
        "hasVector": False,
        "hookName": source.hook_name,
        "topkCosSimIndices": arrays["neighbours"][latent].tolist(),
        "topkCosSimValues": _all_rounded(arrays["neighbour_cosine"][latent].tolist()),
        "pos_str": [text for text, _ in raised],
        "pos_values": _all_rounded(value for _, value in raised),
        "neg_str": [text for text, _ in lowered],
        "neg_values": _all_rounded(value for _, value in lowered),
        "frac_nonzero": float(store.table["frequency"][latent]),
        "freq_hist_data_bar_heights": _all_rounded(heights),
        "freq_hist_data_bar_values": _all_rounded((i + 0.5) * width for i in range(len(heights))),
    }


def _activations(source: Source, store: FeatureStore, latent: int) -> Iterator[dict[str, Any]]:
    """Rows of the table Activation, one for each piece of text."""
    largest = float(store.table["maximum"][latent])
    for number, example in enumerate(store.examples(latent)):
        values = _all_rounded(example.activations)
        name = f"{source.model_id}/{source.id}/{latent}/{number}/{source.created_at}"
        yield {
            "id": "c" + sha256(name.encode()).hexdigest()[:24],
            "modelId": source.model_id,
            "layer": source.id,
            "index": str(latent),
            "creatorId": source.creator_id,
            "createdAt": source.created_at,
            "tokens": example.tokens,
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            **_bin(example, largest, store, latent),
            "qualifyingTokenIndex": example.at,
        }


def _bin(example: Example, largest: float, store: FeatureStore, latent: int) -> dict[str, float]:
    """The interval for which a piece was drawn and the share of all tokens with it.

    For the strongest pieces SAEDashboard writes -1, the maximum and -1.
    """
    if example.interval == 0:
        return {"binMin": -1.0, "binMax": _rounded(largest), "binContains": -1.0}
    low, high = 0.5**example.interval, 0.5 ** (example.interval - 1)
    counts = store.arrays["histogram"][latent].tolist()
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    within = sum(
        count * max(0.0, min(high, end) - max(low, start)) * len(counts)
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True)
    )
    return {
        "binMin": _rounded(low * largest),
        "binMax": _rounded(high * largest),
        "binContains": _rounded(within / store.results["tokens"]),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _all_rounded(values: Iterable[float]) -> list[float]:
    return [_rounded(value) for value in values]
