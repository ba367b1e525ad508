"""One of two ranks: `python -m tests.side_by_side.rank FOLDER`, in a launcher's environment."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_sae import SideBySide
from lightning_sae.callbacks import DecoderNormProjection
from tests.ranks.cases import BATCH, CASES, STEPS, activations, build, train

NAMES = [name for name, case in CASES.items() if not case.flags]
DIVERGES = "diverges"


def members() -> list[dict[str, Any]]:
    """All cases, and one that goes no further than its first steps."""
    found: list[dict[str, Any]] = []
    for name in NAMES:
        case, norm = CASES[name], [DecoderNormProjection()]
        free = case.arguments.get("decoder_norm") == "free"
        callbacks = [*case.callbacks(), *([] if free else norm)]
        found.append({"name": name, "sae": build(case), "callbacks": callbacks})
    wild = build(CASES[NAMES[0]])
    wild.lr = 1e300
    return [*found[:2], {"name": DIVERGES, "sae": wild}, *found[2:]]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    half, ranks = BATCH // 2, {"strategy": "ddp", "devices": 2}
    batches = activations()[:, rank * half : (rank + 1) * half]
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {**dict.fromkeys(silent, False), **ranks, "accelerator": "cpu"}
    settings |= {"max_steps": STEPS, "precision": "64-true", "use_distributed_sampler": False}
    model = SideBySide(members())
    Trainer(**settings).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    different = []
    for name in NAMES:
        alone, own = train(CASES[name], batches, **ranks), dict(model[name].state_dict())
        if not all(torch.equal(own[key], value) for key, value in alone["state"].items()):
            different.append(name)
    others = members()[rank:]  # one has a member that the other has not
    refused = ""
    try:
        Trainer(**settings).fit(SideBySide(others), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    except ValueError as error:
        refused = str(error)
    found = {"different": different, "stopped": list(model.stopped), "refused": refused}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
