"""Messages of the command line at the end of a run of several SAEs."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

from lightning_sae.callbacks import ExportSAE, HeldOutEvaluation, LatentWriter
from lightning_sae.side_by_side.member import Member
from lightning_sae.side_by_side.module import SideBySide

C = TypeVar("C", bound=Callback)

COLUMNS = ("l0", "fvu", "dead_fraction")


def after_fit(model: SideBySide, trainer: Trainer, config: Path) -> Iterator[str]:
    """Which SAEs were trained, which were stopped, and what to type next."""
    root = Path(trainer.default_root_dir)
    last = root / "checkpoints" / "last.ckpt"
    yield f"\nTrained {len(model.active)} SAEs for {trainer.global_step} steps. Made:"
    for member in model.active:
        folder = _callback(member, ExportSAE).folder
        if folder is not None:
            yield f"  {folder}"
    if last.exists():
        yield f"  {last}  all members, to resume from"
    yield from _stopped(model)
    yield "Next:"
    yield "  " + shlex.join(
        ["lightning-sae", "test", "--config", str(config), "--ckpt_path", str(last)]
    )
    yield _tensorboard(root)


def after_test(model: SideBySide, trainer: Trainer) -> Iterator[str]:
    """Some figures of each member, and where the rest are."""
    found = {each.name: _callback(each, HeldOutEvaluation) for each in model.active}
    yield "\nOn held-out data:"
    results = {name: evaluation.results for name, evaluation in found.items()}
    yield from _table(results, (*COLUMNS, "loss_recovered_zero"))
    yield "Made:"
    yield from (f"  {evaluation.path}" for evaluation in found.values())
    yield from _stopped(model)
    yield "Next:"
    yield _tensorboard(Path(trainer.default_root_dir))


def after_validate(model: SideBySide) -> Iterator[str]:
    """Some figures of each member."""
    yield "\nValidated on held-out data:"
    metrics = {each.name: each.trainer.callback_metrics for each in model.active}
    yield from _table(metrics, [f"val/{name}" for name in COLUMNS])
    yield from _stopped(model)
    yield "Made nothing: `lightning-sae test` writes a results.json for each."


def after_predict(model: SideBySide) -> Iterator[str]:
    """Where the latents are."""
    yield "\nPredicted the latents of held-out data. Made:"
    yield from (f"  {_callback(member, LatentWriter).folder}" for member in model.active)


def _tensorboard(root: Path) -> str:
    return f"  tensorboard --logdir {shlex.quote(str(root / 'tensorboard'))}"


def _table(of_members: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Iterator[str]:
    width = max(map(len, of_members))
    yield f"  {'':<{width}}" + "".join(f"{name:>21}" for name in columns)
    for name, values in of_members.items():
        found = [values.get(column) for column in columns]
        cells = ["" if value is None else f"{value:.6g}" for value in found]
        yield f"  {name:<{width}}" + "".join(f"{cell:>21}" for cell in cells)


def _stopped(model: SideBySide) -> Iterator[str]:
    if model.stopped:
        yield "Stopped, and not exported:"
        yield from (f"  {name}: {reason}" for name, reason in model.stopped.items())


def _callback(member: Member, kind: type[C]) -> C:
    return next(callback for callback in member.callbacks if isinstance(callback, kind))
