"""The Python standard library's source, as text that every machine with Python carries."""

import functools
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lightning_sae.data.documents import Document

# Tests are not installed everywhere; site-packages are not the standard library.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
}
_MINIMUM_BYTES = 1_000_000


def standard_library_documents() -> list[Document]:
    """Reads the source of the Python standard library found on this machine.

    Left out: `site-packages`, tests, the generated `_sysconfigdata*` (it describes the machine),
    and files that `tokenize.open` cannot decode.

    Returns:
        One document per `.py` file, named by its POSIX path below the library's folder and
        sorted by that name; about 800 files and 12 MB on Python 3.11.

    Raises:
        ValueError: If less than 1 MB of source is found, as in Pythons shipped without source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    documents = list(_sorted_documents_below(folder))
    found = sum(len(document.text) for document in documents)
    if found < _MINIMUM_BYTES:
        raise ValueError(
            f"embedded corpus: expected at least {_MINIMUM_BYTES:,} characters of Python source "
            f"below {folder}, found {found:,} in {len(documents)} files. This Python comes "
            "without its standard library's source: use a Python from python.org, conda, uv, "
            "pyenv or the system's full package, or give text files of your own"
        )
    return documents


@functools.lru_cache(maxsize=1)  # a process may open it many times, as runs and tests do
def _sorted_documents_below(folder: Path) -> tuple[Document, ...]:
    return tuple(sorted(_documents_below(folder)))


def _documents_below(folder: Path) -> Iterator[Document]:
    for root, folders, files in os.walk(folder):
        folders[:] = set(folders) - _SKIPPED_FOLDERS  # not gone into
        for name in files:
            path = Path(root, name)
            if path.suffix != ".py" or name.startswith("_sysconfigdata"):
                continue
            text = _decode(path)
            if text is not None:
                # Empty modules count as before, so that results on this text stay what they are.
                yield Document(path.relative_to(folder).as_posix(), text, may_be_empty=True)


def _decode(path: Path) -> str | None:
    """Returns the file's text in its declared encoding, or None if that does not fit."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None
