"""The folder of a study: new, or that of the same study, which then goes on."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sae.files import write_atomically

SETTINGS = "settings.json"


def open_folder(output: str | Path, settings: dict[str, Any]) -> Path:
    """Make the folder of a study, or go on in that of one with the same settings.

    Args:
        output: The folder.
        settings: What the study's results depend on, as plain values.

    Raises:
        ValueError: If the folder has something else in it; says which settings differ.
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


def write_json(path: Path, content: Any) -> Path:
    """Write plain values."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows; columns are the keys of all of them, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
    return path
