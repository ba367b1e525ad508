"""The configurations that come with the package: `--config NAME` and `lightning-sae configs`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

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
    """Command-line arguments in which each `--config` is a file; see `found`."""
    result: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and equals:
            arg = f"{name}={found(value)}"
        elif result and result[-1] in ("--config", "-c"):
            arg = found(arg)
        result.append(arg)
    return result


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
