"""The configurations that come with the package: `--config NAME` and `lightning-sae configs`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """Names of all configurations: their paths below `configs/` without the suffix."""
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return [path.relative_to(FOLDER).with_suffix("").as_posix() for path in files]


def summary(name: str) -> str:
    """The first sentence of a configuration's leading comment."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return comment.split(". ")[0].split(": lightning-sae")[0].rstrip(".") + "."


def found(given: str) -> str:
    """The file for `--config`: `given` if that file exists, else the configuration of that name.

    Raises:
        ValueError: If neither exists.
    """
    if Path(given).exists() or given.lstrip().startswith("{"):
        return given
    packaged = FOLDER / f"{given.removesuffix('.yaml').removeprefix('configs/')}.yaml"
    if packaged.is_file():
        return str(packaged)
    raise ValueError(
        f"Expected argument `config` to be a file or one of {', '.join(names())} but got {given}: "
        "correct the path, or choose one of these (`lightning-sae configs` lists them)."
    )


def with_files(args: Sequence[str]) -> list[str]:
    """Command-line arguments in which each `--config` is a file; see `found`.

    Raises:
        ValueError: If there is no such file, or a value in it contains itself.
    """
    result: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and equals:
            arg = f"{name}={_sound(found(value))}"
        elif result and result[-1] in ("--config", "-c"):
            arg = _sound(found(arg))
        result.append(arg)
    return result


def _sound(file: str) -> str:
    """The file, unless one of its YAML anchors is used within itself: the parser would not end."""
    try:
        root = yaml.compose(Path(file).read_text(), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):  # the parser says more
        return file
    if root is not None and _contains_itself(root, set(), set()):
        raise ValueError(
            f"Could not read {file}: a value contains itself, for an alias (`*name`) is used "
            "within the value of its anchor (`&name`). Write the value out."
        )
    return file


def _contains_itself(node: yaml.Node, above: set[int], done: set[int]) -> bool:
    """Whether a node is below itself; `above` and `done` are the `id`s of others."""
    if id(node) in above or id(node) in done:
        return id(node) in above
    inside = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
    found = any(_contains_itself(part, above | {id(node)}, done) for part in parts)
    done.add(id(node))
    return found


def main(args: Sequence[str]) -> None:
    """Run `lightning-sae configs`.

    Raises:
        ValueError: If there is no such configuration, or the file to write exists.
    """
    parser = argparse.ArgumentParser(
        "lightning-sae configs",
        description="List the configurations that come with the package, or write one to a file "
        "for editing. `lightning-sae fit --config NAME` uses one as it is.",
    )
    parser.add_argument("name", nargs="?", help="configuration to write; lists all by default")
    parser.add_argument("--output", type=Path, help="file to write; NAME.yaml by default")
    given = parser.parse_args(args)
    if given.name is None:
        width = max(map(len, names()))
        print("\n".join(f"{name:<{width}}  {summary(name)}" for name in names()))  # noqa: T201
        return
    source = Path(found(given.name))
    path = given.output or Path(source.name)
    if path.exists():
        raise ValueError(
            f"Expected argument `output` to be a new file but {path} exists: choose another name."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source.read_text())
    print(f"Made: {path}\nNext:\n  lightning-sae fit --config {shlex.quote(str(path))}")  # noqa: T201
