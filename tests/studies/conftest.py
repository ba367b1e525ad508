"""Settings for studies of a few seconds: the embedded model on two small texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("decoder.py", "encoder.py", "scanner.py", "tool.py")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of a setting that trains SAEs in a second."""
    folder = tmp_path_factory.mktemp("text")
    sources = [Path(json.__file__).with_name(name).read_text() for name in NAMES]
    for name, part in (("train", sources[:2]), ("held-out", sources[2:])):
        (folder / f"{name}.txt").write_text("<|endoftext|>".join(part))
    return {
        "text": str(folder / "train.txt"),
        "validation_text": str(folder / "held-out.txt"),
        "context_length": 16,
        "d_sae": 24,
        "steps": 8,
        "batch_size": 64,
        "buffer_size": 512,
        "held_out_tokens": 512,
    }


@pytest.fixture(scope="session")
def words(small: dict[str, Any]) -> Sequence[str]:
    """The same for the command line."""
    return [f"--{name}={value}" for name, value in small.items()]
