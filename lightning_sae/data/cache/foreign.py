"""Activations that are not a cache: tensors, arrays, .npy and safetensors files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sae.data.cache.rows import Rows
from lightning_sae.data.cache.shards import POSITIONS, TOKENS, mapped
from lightning_sae.files import first_line
from lightning_sae.tensors import DTYPES

SUFFIXES = (".npy", ".safetensors")
NAMELESS = "activations"


def open_foreign(activations: Any, hook_names: Sequence[str]) -> Rows:
    """Rows of activations [..., d], in memory or mapped from files; leading axes become one.

    Args:
        activations: A tensor or array, a dictionary of these by hook, a .npy or .safetensors file,
            a folder of such files, or a list of files, which follow one another.
        hook_names: Names to select where the input has names; otherwise the name to give it.

    Raises:
        ValueError: If something cannot be read, is not a matrix of floating-point numbers, or does
            not match the rest.
    """
    if isinstance(activations, Mapping):
        return Rows([_chosen(activations, hook_names, "the dictionary")])
    if isinstance(activations, Tensor | np.ndarray):
        return Rows([_chosen({"": activations}, hook_names, "the tensor")])
    if not isinstance(activations, str | Path | Sequence):
        raise ValueError(
            f"Expected argument `activations` to be a cache, a tensor, an array, or files "
            f"({', '.join(SUFFIXES)}) but got a {type(activations).__name__}: give one of these."
        )
    files = _files(activations)
    shards = [_chosen(_read(file), hook_names, str(file)) for file in files]
    shapes = [{name: (x.shape[1], x.dtype) for name, x in shard.items()} for shard in shards]
    for file, shape in zip(files, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"Expected argument `activations` to name files of one kind but {file} holds "
                f"{shape} and {files[0]} holds {shapes[0]}: give files of one hook and dtype."
            )
    return Rows(shards)


def _files(activations: Any) -> list[Path]:
    given = [activations] if isinstance(activations, str | Path) else list(activations)
    others = [type(each).__name__ for each in given if not isinstance(each, str | Path)]
    if others:
        raise ValueError(
            f"Expected argument `activations`, a list, to name files but it holds a {others[0]}: "
            "join tensors by `torch.cat`, and arrays by `numpy.concatenate`."
        )
    paths = [Path(each).expanduser() for each in given]
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(path for path in paths[0].iterdir() if path.suffix in SUFFIXES)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(
            f"Expected argument `activations` to be a cache or files ({', '.join(SUFFIXES)}) but "
            f"there is none at {', '.join(missing) or activations}: check the path, or write a "
            "cache by `lightning-sae cache`."
        )
    return paths


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return mapped(path, lambda name: name not in (TOKENS, POSITIONS))
    if path.suffix != ".npy":
        raise ValueError(
            f"Expected argument `activations` to name {', '.join(SUFFIXES)} files but got {path}: "
            "save it by `numpy.save` or `safetensors.torch.save_file`."
        )
    try:
        # Copy-on-write, so the file is never changed.
        return {"": np.load(path, mmap_mode="c")}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"Could not read {path}: it is not a complete array ({first_line(error)}). Write "
            "it again by `numpy.save`."
        ) from error


def _chosen(found: Mapping[str, Any], hook_names: Sequence[str], where: str) -> dict[str, Tensor]:
    """The requested tensors, as rows."""
    if len(found) == 1 and len(hook_names) <= 1 and not set(hook_names) & found.keys():
        ((name, only),) = found.items()
        if not name or not hook_names:
            own = hook_names[0] if hook_names else name or NAMELESS
            return {own: _rows(only, where)}
    if not found:
        raise ValueError(f"Expected argument `activations` to hold a tensor but {where} has none.")
    missing = [name for name in hook_names if name not in found]
    if missing:
        raise ValueError(
            f"Expected argument `hook_name` to be one of {', '.join(found)}, which {where} holds, "
            f"but got {', '.join(missing)}: choose one that is there."
        )
    rows = {name: _rows(found[name], f"{name} of {where}") for name in hook_names or found}
    lengths = {name: len(each) for name, each in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"Expected argument `activations` to have as many rows at each hook but {where} has "
            f"{lengths}: choose one by `hook_name`."
        )
    return rows


def _rows(found: Any, where: str) -> Tensor:
    if isinstance(found, np.ndarray) and (found.dtype.kind != "f" or found.dtype.itemsize > 8):
        raise ValueError(
            f"Expected argument `activations` to hold floating-point numbers but {where} is "
            f"{found.dtype}: convert it, as `x.astype('float32')` does."
        )
    if isinstance(found, np.ndarray) and not found.dtype.isnative:
        raise ValueError(
            f"Expected argument `activations` to have this machine's byte order but {where} is "
            f"{found.dtype.str}: convert it, as `x.astype({found.dtype.newbyteorder('=').str!r})` "
            "does."
        )
    x = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"Expected argument `activations` to hold floating-point numbers but {where} is "
            f"{kind}: convert it, as `x.float()` does."
        )
    if x.is_meta or x.layout != torch.strided or x.is_nested:
        kind = "on the device meta, without values" if x.is_meta else "not dense"
        raise ValueError(
            f"Expected argument `activations` to be dense, with values, but {where} is {kind}: "
            "give an ordinary tensor."
        )
    if x.dim() < 2 or not x.numel():
        raise ValueError(
            f"Expected argument `activations` to be of shape [rows, d] but {where} has "
            f"{list(x.shape)}: give one vector for each token."
        )
    return x.detach().flatten(0, -2).cpu()
