"""The figures of evaluated SAEs for TensorBoard's page "HParams"."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ABOUT = ("architecture", "d_sae", "d_in", "hook_name", "model")
"""What is shown beside the figures of an SAE, in this order."""


def write_hparams(
    folder: Path, results: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, float]]
) -> None:
    """Write a run of TensorBoard for each SAE: what it is, and its figures.

    Args:
        folder: Gets a folder for each SAE.
        results: The SAEs, each with its `name` and `ABOUT`.
        rows: The figures of each.
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import
    from torch.utils.tensorboard.summary import hparams

    for result, figures in zip(results, rows, strict=True):
        about = {name: result[name] for name in ABOUT}
        inside = [part.replace("..", "_") for part in Path(result["name"]).parts]
        run = folder.joinpath(*(part for part in inside if part != Path(part).anchor))
        with SummaryWriter(str(run)) as writer:
            for part in hparams(about, {**figures}):
                writer.file_writer.add_summary(part)
            for name, value in figures.items():
                writer.add_scalar(name, value)
