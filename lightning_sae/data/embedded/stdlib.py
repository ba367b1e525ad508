"""The Python standard library's source, as text that every machine with Python carries."""

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
    documents = sorted(_documents_below(folder))
    found = sum(len(document.text) for document in documents)
    if found < _MINIMUM_BYTES:
        raise ValueError(
            f"embedded corpus: expected at least {_MINIMUM_BYTES:,} characters of Python source "
            f"below {folder}, found {found:,} in {len(documents)} files. This Python comes "
            "without its standard library's source: use a Python from python.org, conda, uv, "
            "pyenv or the system's full package, or give text files of your own"
        )
    return documents


def _documents_below(folder: Path) -> Iterator[Document]:
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = _decode(path)
        if text is not None:
            # Empty modules count as before, so that results on this text stay what they are.
            yield Document(relative.as_posix(), text, may_be_empty=True)


def _decode(path: Path) -> str | None:
    """Returns the file's text in its declared encoding, or None if that does not fit."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None
