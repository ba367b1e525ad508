"""The folder of a study, and the files in it."""

import csv
import json
from pathlib import Path

import pytest

from lightning_sae.studies.shared.folder import (
    SETTINGS,
    computed_once,
    open_folder,
    write_csv,
    write_json,
)


def test_a_new_folder_and_an_empty_one_are_taken(tmp_path: Path) -> None:
    for name in ("new/inside", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        folder = open_folder(tmp_path / name, {"steps": 3})
        assert json.loads((folder / SETTINGS).read_text()) == {"steps": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty one."""
    return tmp_path / "study"


def test_a_study_with_the_same_settings_goes_on(folder: Path) -> None:
    open_folder(folder, {"steps": 3, "rates": [1, 2]})
    (folder / "done.json").write_text("kept")
    assert open_folder(str(folder), {"steps": 3, "rates": (1, 2)}) == folder
    assert (folder / "done.json").read_text() == "kept"


def test_what_differs_is_named_and_nothing_is_touched(folder: Path) -> None:
    open_folder(folder, {"steps": 3, "seed": 1, "old": 0})
    match = "with another `steps`, `old`, `new`: name another"
    with pytest.raises(ValueError, match=match):
        open_folder(folder, {"steps": 4, "seed": 1, "new": 0})
    assert json.loads((folder / SETTINGS).read_text())["steps"] == 3


def test_something_else_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    for output in (folder, folder / "mine.txt"):
        with pytest.raises(ValueError, match="which holds something else: name another one"):
            open_folder(output, {})
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_rows_may_have_different_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "new" / "table.csv", [{"b": 1, "a": "x, y"}, {"b": 2, "c": 0.1}])
    assert path.read_text().splitlines()[0] == "b,a,c"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows == [{"b": "1", "a": "x, y", "c": ""}, {"b": "2", "a": "", "c": "0.1"}]


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_json(tmp_path / "new" / "results.json", {"a": [1.5, None]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert [kept.name for kept in path.parent.iterdir()] == ["results.json"]


def test_what_is_in_a_file_is_not_computed_again(tmp_path: Path) -> None:
    path, values = tmp_path / "new" / "kept.json", iter([{"a": (1, 2)}, {"a": 3}])
    assert computed_once(path, lambda: next(values)) == {"a": [1, 2]}
    assert computed_once(path, lambda: next(values)) == {"a": [1, 2]}
