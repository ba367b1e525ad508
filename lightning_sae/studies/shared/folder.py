"""The folder of a study and its files."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_sae.files import write_atomically
from lightning_sae.studies.shared.rows import Row

SETTINGS = "settings.json"


def open_folder(output: str | Path, settings: dict[str, Any]) -> Path:
    """Create the folder of a study, or reopen one with the same settings.

    Args:
        output: The folder.
        settings: The settings that determine the results, as plain values.

    Raises:
        ValueError: If the folder holds anything else; names the settings that differ.
    """
    folder = Path(output)
    path, text = folder / SETTINGS, json.dumps(settings, indent=1) + "\n"
    if path.is_file() and path.read_text() == text:
        return folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(
            f"Expected argument `output` to be a new or empty folder, or that of a study with the "
            f"same settings, but got {output}, which {_difference(path, settings)}: name another "
            "one."
        )
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return folder


def _difference(path: Path, settings: dict[str, Any]) -> str:
    if not path.is_file():
        return "holds something else"
    there, here = json.loads(path.read_text()), json.loads(json.dumps(settings))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "is of a study with another " + ", ".join(f"`{name}`" for name in names)


def computed_once(path: Path, compute: Callable[[], Any]) -> Any:
    """The plain values in a JSON file; they are computed and written first if it is missing."""
    if not path.is_file():
        write_json(path, compute())
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> Path:
    """Write plain values."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows; the columns are the keys of all rows, in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
    return path
