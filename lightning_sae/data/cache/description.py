"""The manifest's description of the data a cache was written from, and how to rebuild that data."""

import glob
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sae.data.cache.manifest import Manifest, Shard, Split
from lightning_sae.data.cache.rows import Rows
from lightning_sae.data.cache.shards import open_rows
from lightning_sae.data.cache.writer import by_hook
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.trial import trial_tokens

ARGUMENTS = (
    "hook_name",
    "text_column",
    "text_split",
    "streaming",
    "validation_fraction",
    "document_start",
    "separator",
    "pack",
    "keep_rest",
    "chat_roles",
    "context_length",
    "blocks_per_pass",
    "model_dtype",
    "head",
    "drop_special_tokens",
    "positions",
    "max_norm_multiple",
    "seed",
)
"""Arguments of `ActivationDataModule` that, with model and text, determine what it reads."""

SCALED_ON = 2**16
"""Number of evenly spaced rows that estimate the mean norm after centring."""


def describe(data: ActivationDataModule, n_parts: int, shard_bytes: int) -> Manifest:
    """The manifest of a cache before it is written."""
    found: Any = data.d_in
    widths = found if isinstance(found, dict) else {data.hook_names[0]: found}
    arguments = {
        **{name: getattr(data, name) for name in ARGUMENTS},
        "model": _model_of(data),
        "model_kwargs": _plain(_kwargs_of(data)),
        "tokenizer": _tokenizer_of(data.tokenizer),
        "text": _text_of(data.text),
        "validation_text": _text_of(data.validation_text),
    }
    tokenizer = data.language_model.tokenizer
    source = {**data.source, "tokenizer": None if tokenizer is None else tokenizer.name_or_path}
    return Manifest(
        source=json.loads(json.dumps(source)),
        data=json.loads(json.dumps(arguments)),
        settings={"parts": n_parts, "shard_bytes": shard_bytes},
        widths=widths,
        dtype=str(data.dtype).removeprefix("torch."),
        probe=probe(data),
    )


def _model_of(data: ActivationDataModule) -> str | None:
    if data.model == EMBEDDED_MODEL:
        return "embedded"
    if isinstance(data.model, str | Path):
        return _absolute(data.model)
    return data.language_model.name or None


def _kwargs_of(data: ActivationDataModule) -> dict[str, Any] | None:
    """`model_kwargs`, with the revision that was downloaded."""
    revision = data.language_model.identity.get("model_revision")
    return {"revision": revision, **(data.model_kwargs or {})} if revision else data.model_kwargs


def _tokenizer_of(tokenizer: Any) -> str | None:
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return None if tokenizer is None else _absolute(tokenizer)
    return getattr(tokenizer, "name_or_path", None) or None


def _text_of(text: Any) -> str | list[str] | None:
    """Absolute paths or hub names; None for rows from Python."""
    if isinstance(text, str | Path):
        return _absolute(text)
    if isinstance(text, list | tuple) and all(isinstance(each, str | Path) for each in text):
        return [_absolute(each) for each in text]
    return None


def _absolute(name: str | Path) -> str:
    path = os.path.expanduser(name)
    return os.path.abspath(path) if glob.glob(path) else str(name)


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return None


@torch.no_grad()
def probe(data: ActivationDataModule) -> dict[str, list[float]]:
    """The activation at each hook for the last of a few fixed tokens."""
    model = data.language_model
    rows = by_hook(data, model.activations(trial_tokens(model.vocabulary)).float()[0])
    return {name: part[-1].cpu().tolist() for name, part in rows.items()}


def require_same_model(
    saved: Mapping[str, list[float]], present: Mapping[str, list[float]], dtype: str, name: str
) -> None:
    """Raise a ValueError if two probes come from different weights, whatever the models' names.

    Args:
        saved: The probe of the cache.
        present: The probe of the loaded model.
        dtype: dtype of the model's weights.
        name: The model's name, for the message.
    """
    tolerance = 1e-3 if dtype == "float32" else 5e-2
    for hook in saved.keys() & present.keys():
        one, other = torch.tensor(saved[hook]), torch.tensor(present[hook])
        if one.shape != other.shape or (one - other).norm() > tolerance * one.norm():
            raise ValueError(
                f"Expected argument `model` to be the one that the cache was written with but "
                f"{name} gives other activations at {hook}: give that model, or write a cache of "
                "this one into another folder."
            )


def require_same_data(folder: Path, saved: Manifest, present: Manifest) -> None:
    """Raise a ValueError if a cache cannot be continued, because its rows would differ."""
    one, other = _compared(saved), _compared(present)
    names = sorted(one.keys() | other.keys())
    differing = [name for name in names if one.get(name) != other.get(name)]
    if differing:
        pairs = "; ".join(f"`{n}` to be {one.get(n)} but got {other.get(n)}" for n in differing)
        raise ValueError(
            f"Expected, as in the cache {folder}, {pairs}: it can only be continued as it was "
            "begun. Give the same arguments, or another folder."
        )
    name = str(present.source.get("model"))
    require_same_model(saved.probe, present.probe, str(present.source.get("model_dtype")), name)


def _compared(manifest: Manifest) -> dict[str, Any]:
    """Plain values that determine the rows of a cache."""
    data = {name: value for name, value in manifest.data.items() if value is not None}
    return {**manifest.source, **data, "widths": manifest.widths, "dtype": manifest.dtype}


# Known only when everything is written.


def completed(folder: Path, begun: Manifest, parts: list[dict[Split, dict[str, Any]]]) -> Manifest:
    """The manifest of a cache whose parts are written.

    Args:
        folder: The cache.
        begun: Its manifest so far.
        parts: The records of its parts.

    Raises:
        ValueError: If there is no row to train on.
    """
    shards: dict[Split, list[Shard]] = {}
    tokens, left_out = {}, {}
    for split in parts[0]:
        records = [part[split] for part in parts]
        shards[split] = [shard for record in records for shard in record["shards"]]
        tokens[split] = sum(record["tokens"] for record in records)
        reasons = records[0]["left_out"]
        left_out[split] = {name: sum(r["left_out"][name] for r in records) for name in reasons}
    manifest = begun._replace(
        complete=True, tokens=tokens, left_out=left_out, shards=shards, statistics={}
    )
    if not manifest.rows("training"):
        raise ValueError(
            f"The {tokens['training']:,} tokens that were read gave no activation: all are left "
            "out. Widen `positions` or `max_norm_multiple`, and write into another folder."
        )
    rows = open_rows(folder, manifest, "training")
    records = [part["training"] for part in parts if part["training"]["shards"]]
    return manifest._replace(statistics=_statistics(rows, records))


def _statistics(rows: Rows, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    n = len(rows)
    spread = rows.take(torch.linspace(0, n - 1, min(n, SCALED_ON)).long())
    found = {}
    for name, width in rows.widths.items():
        sums = [torch.tensor(record["sums"][name], dtype=torch.float64) for record in records]
        mean = (torch.stack(sums).sum(0) / n).float()
        norm = sum(record["norms"][name] for record in records) / n
        found[name] = {
            "mean": mean.tolist(),
            "scale": math.sqrt(width) / max(norm, 1e-30),
            "centered_scale": _centered_scale(spread[name].float() - mean, width),
        }
    return found


def _centered_scale(rows: Tensor, width: int) -> float:
    return math.sqrt(width) / max(float(rows.norm(dim=-1).mean()), 1e-30)
