"""Messages of the command line at the end of a run of one SAE."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_sae.callbacks import ExportSAE, HeldOutEvaluation, LatentWriter

C = TypeVar("C", bound=Callback)


@rank_zero_only
def say(*lines: str) -> None:
    """Print lines to the terminal, on rank 0 only."""
    sys.stdout.write("\n".join(lines) + "\n")


def after_fit(model: LightningModule, trainer: Trainer, config: Path) -> Iterator[str]:
    """What was written, and the next commands."""
    root = Path(trainer.default_root_dir)
    last = root / "checkpoints" / "last.ckpt"
    made = {
        callback_of(trainer, ExportSAE).folder: "the SAE, for lightning_sae.load",
        last: "to resume from",
        root / "tensorboard": "curves and histograms",
    }
    yield f"\nTrained {type(model).__name__} for {trainer.global_step} steps. Made:"
    yield from (f"  {path}  {what}" for path, what in made.items() if path and path.exists())
    yield "Next:"
    yield _typed("lightning-sae", "test", "--config", config, "--ckpt_path", last)
    yield from _how_to_watch(trainer)


def after_test(trainer: Trainer) -> Iterator[str]:
    """The metrics, their path, and the next commands."""
    evaluation = callback_of(trainer, HeldOutEvaluation)
    exported = _newest(Path(trainer.default_root_dir))
    yield "\nOn held-out text:"
    yield from (f"  {name:<30}{value:>14.6g}" for name, value in evaluation.results.items())
    yield f"Made: {evaluation.path}"
    yield "Next:"
    yield from _how_to_watch(trainer)
    yield _typed("python", "-c", f"import lightning_sae; print(lightning_sae.load({exported!r}))")


def after_validate() -> Iterator[str]:
    """That nothing was written."""
    yield "\nValidated on held-out text. Made nothing: `lightning-sae test` writes results.json."


def after_predict(trainer: Trainer) -> Iterator[str]:
    """Where the latents are."""
    folder = callback_of(trainer, LatentWriter).folder
    yield "\nPredicted the latents of held-out text."
    yield f"Made: {folder}  safetensors, the non-zero latents of a batch in compressed rows"


def callback_of(trainer: Trainer, kind: type[C]) -> C:
    """The callback of a class that every run has."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, kind))


def _how_to_watch(trainer: Trainer) -> Iterator[str]:
    """The command that shows the curves, where there is a TensorBoard."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield _typed("tensorboard", "--logdir", Path(logger.log_dir))


def _typed(*words: str | Path) -> str:
    """Format a command as an indented line, quoted for a shell."""
    return f"  {shlex.join(map(str, words))}"


def _newest(root: Path) -> str:
    exported = sorted(root.glob("sae*/config.json"), key=lambda path: path.stat().st_mtime)
    return str(exported[-1].parent if exported else root / "sae")
