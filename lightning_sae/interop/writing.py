"""Atomic writes of folders for other libraries; nothing is overwritten."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightning_sae.files import write_atomically
from lightning_sae.interop.outgoing import Outgoing
from lightning_sae.version import __version__


def write_files(folder: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write a folder, each file by its function."""
    for name, write in files.items():
        write_atomically(folder / name, write)


def as_json(content: Mapping[str, Any]) -> Callable[[Path], Any]:
    """Writes a description."""
    text = json.dumps(content, indent=2) + "\n"
    return lambda path: path.write_text(text)


def as_safetensors(tensors: Mapping[str, Tensor]) -> Callable[[Path], Any]:
    """Writes tensors."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return lambda path: save_file(contiguous, path)


def origin(sae: Outgoing) -> dict[str, Any]:
    """The origin of an SAE, stored where the other library does not read it."""
    return {
        "version": __version__,
        "architecture": sae.name,
        "latents": sae.units,
        "folded": sae.notes,
        "k": sae.k,
        "source": {name: value for name, value in sae.source.items() if name != "imported"},
    }


def refuse(sae: Outgoing, format: str, reason: str, nearest: str) -> ValueError:
    """The error about an SAE that a format cannot hold."""
    return ValueError(
        f"The format {format} cannot hold this {sae.name}: {reason}. The nearest: {nearest}."
    )
