"""The layout promised to users: one import name, whole wheels, nothing forgotten."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAPPED = ("callbacks", "configs")  # top-level folders that are parts of the package
WHEEL_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lightning_sae", *MAPPED)


def python_folders(package: Path) -> set[str]:
    """Dotted names of the folders at and below ``package`` that hold Python files."""
    folders = {file.parent for file in package.rglob("*.py")}
    return {".".join(folder.relative_to(package.parent).parts) for folder in folders}


def source_files(repository: Path) -> set[str]:
    """What a wheel must hold of the checkout, as paths inside the wheel."""
    package = repository / "lightning_sae"
    files = {*package.rglob("*.py"), package / "py.typed"}
    files |= {file for file in package.rglob("data/embedded/model/*") if file.is_file()}
    names = {file.relative_to(repository).as_posix() for file in files}
    mapped = [*(repository / "callbacks").rglob("*.py"), *(repository / "configs").rglob("*.yaml")]
    return names | {f"lightning_sae/{file.relative_to(repository).as_posix()}" for file in mapped}


@pytest.fixture(scope="module")
def wheel_names(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Builds a wheel as a checkout without symbolic links does; the names of its files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in WHEEL_SOURCES:
        source = repository / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    for name in MAPPED:
        (folder / "lightning_sae" / name).unlink()
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_folder_with_python_files_is_a_listed_package(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())
    listed = settings["tool"]["setuptools"]["packages"]
    folders = python_folders(repository / "lightning_sae")
    folders |= {f"lightning_sae.{name}" for name in python_folders(repository / "callbacks")}
    folders |= {"lightning_sae.configs", "lightning_sae.configs.full"}
    assert listed == sorted(folders)


def test_every_package_folder_has_an_init_file(repository: Path) -> None:
    for name in python_folders(repository / "lightning_sae"):
        assert (repository / name.replace(".", "/") / "__init__.py").is_file(), name


def test_wheel_holds_every_module_configuration_and_data_file(
    repository: Path, wheel_names: set[str]
) -> None:
    assert source_files(repository) <= wheel_names
    assert "lightning_sae/callbacks/__init__.py" in wheel_names


def test_wheel_installs_one_top_level_name(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_sae"}


def test_callbacks_are_imported_through_the_package_only(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks = importlib.import_module("lightning_sae.callbacks")
    assert callbacks.__name__ == "lightning_sae.callbacks"
    monkeypatch.syspath_prepend(str(repository))
    with pytest.raises(ImportError, match=r"import lightning_sae\.callbacks, not callbacks"):
        importlib.import_module("callbacks")


@pytest.mark.parametrize("package", ["lightning_sae", "lightning_sae.callbacks"])
def test_public_names_exist_once(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__, f"{package} lists no public name"
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
