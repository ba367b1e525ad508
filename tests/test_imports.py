"""Imports point one way, between the package's folders and between their files."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# From the bottom to the top; a folder imports from its own layer and from those below.
LAYERS = (
    {"version"},
    {"files", "archives", "tensors", "checkpoints", "checks"},
    {"distributed"},
    {"functional"},
    {"metrics", "data", "training"},
    {"architectures"},
    {"interop"},
    {"analysis", "loading"},
    {"callbacks"},
    {"side_by_side"},
    {"studies", "bench", "commands"},
    {"cli"},
)
ROOT = "lightning_sae"


def modules(repository: Path) -> dict[str, Path]:
    """Files by dotted name, packages by that of their folder."""
    files = [*(repository / ROOT).rglob("*.py"), *(repository / "callbacks").rglob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(repository).with_suffix("").parts
        parts = (ROOT, *parts) if parts[0] == "callbacks" else parts
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(file: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            each = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in each}
    return names & known


@pytest.fixture(scope="module")
def graph(repository: Path) -> dict[str, set[str]]:
    files = modules(repository)
    return {name: imported(file, set(files)) for name, file in files.items()}


def layer(name: str) -> int | None:
    """Place of a module from the bottom; None for the root, which only gives names to users."""
    folder = name.split(".")[1] if "." in name else ""
    places = [place for place, folders in enumerate(LAYERS) if folder in folders]
    return places[0] if places else None


def test_every_module_has_a_layer(graph: dict[str, set[str]]) -> None:
    without = {name for name in graph if layer(name) is None}
    assert without == {ROOT, f"{ROOT}.__main__"}


def test_imports_never_point_up(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if (own := layer(name)) is not None and (its := layer(other)) is not None and its > own
    ]
    assert not upward


def test_there_is_no_circle(graph: dict[str, set[str]]) -> None:
    # A package's own names come from its files, so it is no part of a circle with them.
    files = {name: {o for o in others if o in graph} for name, others in graph.items()}
    packages = {name for name in files if any(other.startswith(f"{name}.") for other in files)}
    inside = {
        name: {o for o in others if not (o in packages and name.startswith(f"{o}."))}
        for name, others in files.items()
    }
    try:
        list(TopologicalSorter(inside).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' imports '.join(error.args[1])}")
