"""Static checks, run with the tests so that one command and one closing line speak for all."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_static_check_finds_nothing(command: str, repository: Path) -> None:
    arguments = [sys.executable, "-m", *command.split()]
    result = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
