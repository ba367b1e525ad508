"""What every test starts from. The package is imported inside fixtures only.

This file loads before the hook that makes jaxtyping check the package's annotations; a package
imported here would go unchecked.
"""

import functools
import gc
import importlib
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any Hugging Face import, which reads them once: no test reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch, which reads it once, here and in each process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import numpy as np
import pytest
import torch

# The same sums in the same order on every machine. What is so small gains nothing by a second
# thread, and `make test` has a worker on each core.
torch.set_num_threads(1)

BEFORE_THE_PACKAGE = (
    "beartype",
    "huggingface_hub.hub_mixin",
    "lightning.pytorch.cli",
    "matplotlib.pyplot",
    "pandas",
    "safetensors.torch",
    "scipy.optimize",
    "sklearn.linear_model",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)


def pytest_configure(config: pytest.Config) -> None:
    """Imports other libraries, in a process that runs tests.

    While a module of the package is loaded, the hook looks for compiled files under another name,
    so whatever that module were the first to import would be compiled anew, in each process.
    """
    if config.getoption("dist", "no") != "no":
        return  # only hands out tests
    gc.disable()  # what is imported stays
    for name in BEFORE_THE_PACKAGE:
        importlib.import_module(name)


def pytest_collection_finish() -> None:
    """Takes what was imported, a million objects, out of the passes of the garbage collector."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope`, keeps on one worker the tests that share what is slow to make.

    These are the tests of a file with fixtures of a module, and those of two processes. All others
    go wherever there is time. Marks of groups are not used: with pytest 9.2 they are ignored.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Shared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith("tests/ranks/"):
                return "tests/ranks"
            return file if _has_module_fixture(config.rootpath / file) else nodeid

    return Shared(config, log)


@functools.cache
def _has_module_fixture(file: Path) -> bool:
    return 'scope="module"' in file.read_text()


LOGGERS = ("lightning", "lightning.pytorch")


@pytest.fixture(autouse=True)
def _clean_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs each test in an empty folder, as a program without arguments, environment restored."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-sae"])
    before = dict(os.environ)  # Lightning leaves PL_GLOBAL_SEED and the like behind
    levels = {name: logging.getLogger(name).level for name in LOGGERS}  # studies quieten them
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():  # a strategy of several processes in one
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Python's own handler of SIGINT, which a script's background jobs start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds every global generator, so that a test gives the same alone and among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns the execution of annotations off: what users meet who pass another type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The folder of real data, or a skip."""
    folder = os.environ.get("LIGHTNING_SAE_REAL")
    if not folder:
        pytest.skip("LIGHTNING_SAE_REAL is not set: no real language model to test on")
    return Path(folder).resolve(strict=True)


@pytest.fixture(scope="session")
def real_model(real_folder: Path) -> Path:
    """The Hugging Face folder of stories260K, a small Llama trained on TinyStories."""
    return real_folder / "models" / "stories260K"


@pytest.fixture(scope="session")
def real_text(real_folder: Path) -> Path:
    """The folder of text files; documents are joined by ``<|endoftext|>``."""
    return real_folder / "text"
