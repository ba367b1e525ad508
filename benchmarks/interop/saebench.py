"""SAEBench: its own checks of a custom SAE, and its core evaluation, without a hub.

TransformerLens 3.9, which SAEBench uses, loads models of known names alone. So the embedded model,
which has the shape of a Pythia, stands in a hub cache under the name of one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_sae.data.embedded import EMBEDDED_MODEL

NAME, COMMIT = "EleutherAI/pythia-14m", "0" * 40


def checked(folder: Path) -> dict[str, Any]:
    """What SAEBench's checks and its core evaluation say of an SAE trained here.

    In a process of its own, for the hub's client reads where its cache is when it is imported.
    """
    _cache(folder / "cache")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.interop.saebench_worker", str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        return {"stops_at": (done.stderr.strip().splitlines() or ["?"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cache(cache: Path) -> None:
    """A hub cache with the embedded model under another's name."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(EMBEDDED_MODEL, repository / "snapshots" / COMMIT)
