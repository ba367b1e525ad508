"""The manifest of a cache: what its rows are, which files hold them, and their hashes."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_sae.files import read_json, require_checksum, with_checksum, write_json

Split = Literal["training", "held_out"]
SPLITS: tuple[Split, ...] = ("training", "held_out")

FILE = "manifest.json"
FORMAT = "lightning-sae activation cache"
VERSION = 1


class Shard(NamedTuple):
    """A file of rows.

    Attributes:
        file: Its name.
        rows: Rows in it.
        nbytes: Size of the file.
        sha256: Hash of the file, as `sha256sum` prints it.
    """

    file: str
    rows: int
    nbytes: int
    sha256: str


class Manifest(NamedTuple):
    """The content of a cache's `manifest.json`.

    Attributes:
        source: Where the activations come from, as saved with an SAE.
        data: Arguments of the `ActivationDataModule` that read them; null for those that were not
            plain values.
        settings: Settings that, like `source`, may not change when writing continues.
        widths: Width at each hook.
        dtype: dtype of the rows.
        probe: The model's activations at each hook on a few fixed tokens, which identify its
            weights.
        complete: Whether all rows are written. Otherwise no shards are listed.
        tokens: Tokens read, by split.
        left_out: Activations that each reason of the filter left out, by split.
        statistics: By hook, for the training rows: their `mean`, and the factors `scale` and
            `centered_scale` that give the rows, raw or centred, a mean norm of sqrt(width).
        shards: Files by split, in order.
    """

    source: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    widths: dict[str, int]
    dtype: str
    probe: dict[str, list[float]]
    complete: bool = False
    tokens: Mapping[Split, int] = {}
    left_out: Mapping[Split, Mapping[str, int]] = {}
    statistics: Mapping[str, Mapping[str, Any]] = {}
    shards: Mapping[Split, Sequence[Shard]] = {}

    def rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return sum(shard.rows for shard in self.shards.get(split, ()))

    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for each in self.shards.values() for shard in each)

    def digest(self) -> str:
        """Plain values that distinguish these rows from those of another cache."""
        hashes = [shard.sha256 for split in SPLITS for shard in self.shards.get(split, ())]
        return sha256("\n".join(hashes).encode()).hexdigest()[:16]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, replacing an earlier one."""
    shards = {split: [s._asdict() for s in each] for split, each in manifest.shards.items()}
    rows = {split: manifest.rows(split) for split in SPLITS}
    content = {"format": FORMAT, "version": VERSION, **manifest._asdict()}
    write_json(folder / FILE, with_checksum({**content, "rows": rows, "shards": shards}))


def is_cache(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder, whether its cache is complete or not.

    Raises:
        ValueError: If there is none, or it is damaged or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"Expected argument `activations` to be a cache but {folder} has no {FILE}: write one "
            "by `lightning-sae cache`, or give files of activations (.npy, .safetensors)."
        )
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"Could not read {path}: it does not describe a cache of activations. Give the "
            "folder that `lightning-sae cache` wrote."
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"Could not read {path}: its format is version {content.get('version')}, and this "
            f"package reads version {VERSION}. Use the package that wrote it."
        )
    try:
        manifest = Manifest(**{name: content[name] for name in Manifest._fields})
        require_types(manifest._asdict(), KINDS)
        settings = {name: manifest.settings[name] for name in ("parts", "shard_bytes")}
        require_types(settings, dict.fromkeys(settings, int))
        require_types(manifest.probe, dict.fromkeys(manifest.probe, list))
        given: Any = content["shards"]
        require_types(given, dict.fromkeys(given, list))
        shards = {split: [Shard(**own) for own in each] for split, each in given.items()}
        for shard in (shard for each in shards.values() for shard in each):
            require_types(shard._asdict(), KINDS_OF_SHARD)
        if manifest.complete and shards.keys() != {*SPLITS}:
            raise KeyError(f"shards of {SPLITS}")
        _require_hooks(manifest)
        require_checksum(path, content)
        return manifest._replace(shards=shards)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Could not read {path}: it is damaged ({type(error).__name__} {error}). Restore the "
            "file, or write the cache again."
        ) from error


KINDS = {**dict.fromkeys(Manifest._fields, dict), "dtype": str, "complete": bool}
"""Types of a manifest's entries."""
KINDS_OF_SHARD = {"file": str, "rows": int, "nbytes": int, "sha256": str}


def require_types(found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise a TypeError if an entry is of another type."""
    for name, value in found.items():
        if type(value) is not kinds[name]:
            raise TypeError(f"`{name}` is {value!r:.40}, and not a {kinds[name].__name__}")


def _require_hooks(manifest: Manifest) -> None:
    """Raise a KeyError if `source` and `widths` are not of the same hooks."""
    named = manifest.source["hook_name"]
    hooks = {named} if isinstance(named, str) else {*named}
    if hooks != manifest.widths.keys():
        raise KeyError(f"widths of {', '.join(sorted(hooks))}")


def require_complete(folder: Path, manifest: Manifest) -> None:
    """Raise a ValueError if a cache is not complete, or a file is missing or truncated."""
    if not manifest.complete:
        raise ValueError(
            f"The cache {folder} is not complete: it is being written, or its writing was stopped. "
            "Wait for it, or continue with the same `lightning-sae cache` command; with fewer "
            "`--tokens` than are there it ends at once."
        )
    for split in SPLITS:
        for shard in manifest.shards.get(split, ()):
            require_size(folder, shard)


def require_size(folder: Path, shard: Shard) -> None:
    """Raise a ValueError if a shard is missing, or its file has another size."""
    path = folder / shard.file
    size = path.stat().st_size if path.is_file() else None
    if size != shard.nbytes:
        state = "missing" if size is None else f"of {size:,} bytes, not {shard.nbytes:,}"
        raise ValueError(
            f"The shard {path} of SHA-256 {shard.sha256} is {state}: restore the file, or write "
            "the cache again into another folder."
        )
