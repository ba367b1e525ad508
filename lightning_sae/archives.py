"""Archives of `torch.save`, in which damage is found before anything is read.

`torch.load` checks nothing, but the zip archive has a checksum for each record. One record holds
the structure, each other one a tensor.
"""

import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

FOLDER = 0x10
"""The attribute that marks a zip record as a folder."""


def damaged_records(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Records of an archive of `torch.save` that do not match their checksums.

    Raises:
        ValueError: If it is not such an archive.
        BadZipFile: If a record is of a kind that `torch.save` does not write.
    """
    if not file.read(1):
        raise ValueError("the file is empty")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not an archive of `torch.save`, or its end is missing")
    with zipfile.ZipFile(file) as archive:
        return [record for record in archive.infolist() if not _is_intact(archive, record)]


def _is_intact(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Whether a record matches its checksum, which Python compares after reading it.

    Raises:
        BadZipFile: If it is not at its place, or of a kind that `torch.save` does not write. From a
            folder, `torch.load` would read nothing and return uninitialised memory.
    """
    stored = record.compress_type == zipfile.ZIP_STORED and not record.external_attr & FOLDER
    if not stored or record.file_size != record.compress_size:
        raise zipfile.BadZipFile("its table of contents is wrong")
    with archive.open(record) as content:
        try:
            while content.read(2**20):
                pass
        except zipfile.BadZipFile:
            return False
    return True


def entries_in(file: BinaryIO, records: list[zipfile.ZipInfo]) -> set[str]:
    """Names of the entries of a checkpoint whose tensors are in some of its records."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        starts = sorted(record.header_offset for record in archive.infolist())
    file.seek(0)
    with FakeTensorMode():  # tensors without values, which know their offset in the file
        content = torch.load(file, "cpu", weights_only=True)
    damaged = {record.header_offset for record in records}

    def within(tensor: Tensor) -> bool:
        place = tensor.untyped_storage()._checkpoint_offset
        assert place is not None
        return max(start for start in starts if start < place) in damaged

    return {name for name, value in content.items() if any(map(within, tensors_in(value)))}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested structure of dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
