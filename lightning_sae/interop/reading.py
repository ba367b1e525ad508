"""Safe reading of foreign files: nothing is unpickled, and memory is bounded by the file's size."""

import io
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sae.architectures.portable import FLOATS
from lightning_sae.archives import damaged_records
from lightning_sae.files import first_line, read_json

LARGEST_CONFIG = 2**24
"""In bytes. A description of an SAE has a few thousand."""
BOUNDED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Compressions that Python can decompress in part."""
INFLATION = 8
"""Largest ratio of content to file size of an npz archive: random weights hardly compress."""


def refusal(path: Path, reason: str) -> ValueError:
    """The error about a file of another library."""
    return ValueError(f"Could not read {path}: {reason}.")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that describes an SAE.

    Raises:
        ValueError: If it holds something else.
    """
    if path.stat().st_size > LARGEST_CONFIG:
        raise refusal(path, f"it has {path.stat().st_size:,} bytes, too many for a description")
    content = read_json(path)
    if not isinstance(content, dict):
        raise refusal(path, f"it holds a {type(content).__name__}, not a description")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; its reader checks sizes against the file's.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # a damaged header raises errors of many types
        raise refusal(path, f"it is damaged ({first_line(error)})") from error


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz archive, without pickles; their headers are checked against their sizes.

    Raises:
        ValueError: If it is damaged, or would need far more memory than the file has bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records, size = archive.infolist(), path.stat().st_size
            total = sum(record.file_size for record in records)
            if total > INFLATION * size + 2**20:
                raise ValueError(f"its {size:,} bytes claim to hold {total:,}")
            if {record.compress_type for record in records} - BOUNDED:
                raise ValueError("numpy does not write this compression")
            return {
                record.filename.removesuffix(".npy"): _array(archive, record) for record in records
            }
    except Exception as error:  # a damaged archive raises errors of many types
        raise refusal(path, f"it is damaged or not an npz archive ({first_line(error)})") from error


HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _array(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> Tensor:
    with archive.open(record) as member:
        content = member.read(record.file_size)  # nothing more is decompressed
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](file)
    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{record.filename} says shape {shape} of {dtype}, and has other bytes")
    file.seek(0)
    return torch.from_numpy(np.ascontiguousarray(np.load(file, allow_pickle=False)))


def read_pt(path: Path) -> Any:
    """Tensors and plain values in a file of `torch.save`; nothing else is unpickled.

    Raises:
        ValueError: If it is damaged, holds other objects, or tensors larger than their bytes.
    """
    try:
        with path.open("rb") as file:
            if damaged_records(file):
                raise ValueError("it does not match its checksums")
            _require_plain(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise refusal(
            path, f"it is damaged or not a file of tensors ({first_line(error)})"
        ) from error
    for tensor in _tensors(content):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise refusal(path, f"a tensor of shape {tuple(tensor.shape)} has fewer values")
    return content


def names_in_pt(path: Path) -> set[str]:
    """Names in a file of `torch.save`, without reading tensors; empty for other files."""
    if path.suffix not in (".pt", ".pth") or not path.is_file():
        return set()
    try:
        with path.open("rb") as file:
            _require_plain(file)
            file.seek(0)
            with FakeTensorMode():  # tensors without values
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # the reader reports what is wrong
        return set()
    return {str(name) for name in content} if isinstance(content, dict) else set()


def _require_plain(file: Any) -> None:
    """Raise a ValueError if the archive's pickle names more than tensors and dictionaries.

    Some objects that `weights_only` accepts allocate memory of a claimed size.
    """
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        records = [r for r in archive.infolist() if r.filename.endswith("data.pkl")]
        if len(records) != 1 or len(set(names)) != len(names):
            raise ValueError("its table of contents is wrong")
        if records[0].compress_type != zipfile.ZIP_STORED:
            raise ValueError("its structure is compressed, which torch never does")
        pickle = archive.read(records[0])
    for opcode, named, _ in pickletools.genops(pickle):
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4") or (
            opcode.name == "GLOBAL" and not _is_plain(str(named))
        ):
            raise ValueError(f"it holds {named or 'an object'}, and only tensors are read")


def _is_plain(named: str) -> bool:
    module, _, name = named.partition(" ")
    if module == "torch":
        return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    return named in (
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "collections OrderedDict",
    )


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors inside, also in structures that contain themselves."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            left.extend(value.values() if isinstance(value, dict) else value)


def pick(
    tensors: Mapping[str, Any],
    of: Path,
    needed: Mapping[str, int],
    optional: Mapping[str, int] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The known floating-point tensors of a file.

    Args:
        tensors: Tensors by name.
        of: The file, for messages.
        needed: Required names, and numbers of axes.
        optional: Optional names, and numbers of axes.
        ignored: Names that may be present but do not affect the function.

    Raises:
        ValueError: If one is missing, unknown, or has a wrong type or shape.
    """
    known = {**needed, **(optional or {})}
    missing = sorted(needed.keys() - tensors.keys())
    unknown = sorted(str(n) for n in tensors if n not in known and n not in ignored)
    if missing or unknown:
        raise refusal(of, f"its tensors lack {missing}, and {unknown[:8]} are unknown")
    found = {name: tensors[name] for name in known if name in tensors}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise refusal(of, f"{name} is {what}, not a tensor of real numbers")
        if tensor.dim() != known[name]:
            axes, shape = known[name], tuple(tensor.shape)
            raise refusal(of, f"{name} has shape {shape}, not {axes} axes")
    return found
