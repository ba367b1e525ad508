"""All formats, and functions to recognise, read and write them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.architectures.portable import CONFIG, WEIGHTS
from lightning_sae.checks import require_new_folder, require_one_of
from lightning_sae.files import written_whole
from lightning_sae.interop import (
    dictionary_learning,
    gemma_scope,
    llama_scope,
    openai,
    saelens,
    sparsify,
)
from lightning_sae.interop.found import Found, of_one_dtype
from lightning_sae.interop.outgoing import Outgoing, outgoing


class Format(NamedTuple):
    """A file format.

    Attributes:
        files: Description of its files.
        recognises: Whether a folder or file has this format, by file names and contents.
        read: Reads the SAE in a folder or file; also takes the requested class, or None.
        write: Writes an SAE to a folder.
    """

    files: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, str | None], Found]
    write: Callable[[Outgoing, Path], None]


def _of(module: Any) -> Format:
    return Format(module.FILES, module.recognises, module.read, module.write)


MODULES = saelens, dictionary_learning, sparsify, gemma_scope, llama_scope, openai
FORMATS = {module.NAME: _of(module) for module in MODULES}
FORMATS["openai_normalised"] = Format(
    f"{openai.FILES}, of inputs that you have normalised",
    lambda _: False,  # has to be named
    openai.read_normalised,
    openai.write_normalised,
)
"""Formats by name, in the order in which they are tried."""


def is_ours(path: Path) -> bool:
    """Whether `save_pretrained` may have written a folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def recognised(path: Path) -> str | None:
    """The format of a folder or file, or None."""
    return next((name for name, format in FORMATS.items() if format.recognises(path)), None)


def read(
    path: Path, format: str | None = None, architecture: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read another library's files into the arguments of `portable.build`.

    Args:
        path: Folder or file.
        format: Its format; recognised by default.
        architecture: Requested class, for files that can be read as several.

    Returns:
        Class, arguments and source; and the weights. Guesses are reported in a warning and in
        `source["imported"]`.

    Raises:
        ValueError: If its format is unknown, it is damaged, or no SAE of this package computes the
            same.
    """
    if format is not None:
        require_one_of(tuple(FORMATS), format=format)
    named = format or recognised(path)
    if named is None:
        raise ValueError(_unknown(path))
    found = FORMATS[named].read(path, architecture)
    if found.guessed:
        warnings.warn(f"{path} does not say all, so it is taken {_listed(found)}.", stacklevel=3)
    return found.described(named), of_one_dtype(found.weights)


def _listed(found: Found) -> str:
    return "; ".join(found.guessed)


def _unknown(path: Path) -> str:
    known = "; ".join(f"{name}: {format.files}" for name, format in FORMATS.items())
    return (
        f"Expected argument `path` to be an SAE but {path} holds {_contents(path)}. Known are a "
        f"folder that `save_pretrained` wrote (config.json and sae.safetensors), a .ckpt file, and "
        f"{known}. If it is one of these under other names, say which by `format`."
    )


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "a file of another kind" if path.exists() else "nothing, for it does not exist"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    inside = [str(p.relative_to(path)) for p in _below(path)]
    more = f"; SAEs are in {', '.join(inside[:4])}" if inside else ""
    return (", ".join(names[:8]) or "no files") + (", ..." if len(names) > 8 else "") + more


def _below(path: Path) -> list[Path]:
    """Folders with an SAE, one and two levels below."""
    below = [*sorted(path.glob("*/"))[:50], *sorted(path.glob("*/*/"))[:50]]
    return [folder for folder in below if is_ours(folder) or recognised(folder) is not None]


def export(
    sae: SparseAutoencoder, path: str | Path, format: str, unit_decoder: bool = False
) -> Path:
    """Write an SAE to a new folder for another library.

    The written SAE acts on raw activations: centring and scaling are folded into the weights, and
    latents are those of `sae.encode`. This is noted in the files.

    Args:
        sae: An SAE of this package's architectures.
        path: The folder.
        format: `saelens`, `dictionary_learning`, ...: a name in `FORMATS`.
        unit_decoder: Fold the norms of decoder rows into the encoder, as dashboards and benchmarks
            expect. Latents are multiplied by the norms; reconstructions do not change.

    Returns:
        The folder.

    Raises:
        ValueError: If the format cannot hold the SAE, or the folder is not empty.
    """
    require_one_of(tuple(FORMATS), format=format)
    folder = Path(path)
    require_new_folder("path", folder)
    dtype = torch.float32 if format in IN_FLOAT32 else None
    content = outgoing(sae, unit_decoder, dtype)
    with written_whole(folder) as new:
        FORMATS[format].write(content, new)
    return folder


IN_FLOAT32 = ("dictionary_learning", "gemma_scope")
"""Formats whose readers know no other dtype, so that no digits need be dropped for them."""
