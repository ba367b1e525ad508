"""Learning rates, chosen for each family in short runs by the held-out objective."""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import require_positive
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.side_by_side import SideBySide
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.folder import write_json
from lightning_sae.studies.shared.page import Section, Table
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together

SEED = 1_000_003
"""Seed of the short runs; not used by any sweep."""


@dataclass(frozen=True)
class Tuned:
    """The objective at each learning rate.

    Attributes:
        objective: Held-out objective by family and learning rate, None where training diverged.
        coefficient: Coefficient of each family's penalty in these runs.
    """

    objective: Mapping[str, Mapping[float, float | None]]
    coefficient: Mapping[str, float]

    @property
    def chosen(self) -> dict[str, float]:
        """The learning rate of each family with the smallest objective.

        Raises:
            ValueError: If a family diverged at all learning rates.
        """
        return {name: _best(name, tried) for name, tried in self.objective.items()}

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            name: {
                "coefficient": self.coefficient[name],
                "objective": {str(lr): loss for lr, loss in tried.items()},
                "chosen": self.chosen[name],
            }
            for name, tried in self.objective.items()
        }

    def section(self, labels: Mapping[str, str]) -> Section:
        """The table of the report."""
        rates = sorted({lr for tried in self.objective.values() for lr in tried})
        rows = []
        for name, tried in self.objective.items():
            losses = [tried.get(lr) for lr in rates]
            shown = ["diverged" if loss is None else f"{loss:.3f}" for loss in losses]
            chosen = f"{self.chosen[name]:g}"
            rows.append([labels[name], f"{self.coefficient[name]:g}", *shown, chosen])
        headings = ["", "coefficient", *(f"{lr:g}" for lr in rates), "chosen"]
        note = (
            "Objective on held-out text after the short runs, by learning rate; comparable within "
            "a row."
        )
        edges = [labels[name] for name, lr in self.chosen.items() if lr in (rates[0], rates[-1])]
        if edges:
            note += f" At an edge of the grid: {', '.join(edges)}."
        return Section("Learning rates", tables=[Table(headings, rows, note)])


def _best(name: str, tried: Mapping[float, float | None]) -> float:
    known = [(loss, lr) for lr, loss in tried.items() if loss is not None]
    if not known:
        raise ValueError(
            f"Expected argument `learning_rates` to have one at which `{name}` trains but its loss "
            f"is not finite at any of {', '.join(map(str, tried))}: give smaller ones."
        )
    return min(known)[1]


def require_rates(learning_rates: Sequence[float], tuning_steps: int) -> None:
    """Raise a ValueError unless learning rates are different and positive."""
    require_positive(tuning_steps=tuning_steps)
    if len({*learning_rates}) < max(1, len(learning_rates)) or min(learning_rates) <= 0:
        raise ValueError(
            "Expected argument `learning_rates` to be different positive numbers but got "
            f"{list(learning_rates)}."
        )


def tune(
    setting: Setting, families: Sequence[Family], learning_rates: Sequence[float], steps: int
) -> Tuned:
    """Try all learning rates for each family, at the middle one of its coefficients.

    The runs are shorter than those of the study, with the same shares of warm-up and decay, and
    use a separate seed. The criterion is the family's own objective on held-out text: it can
    be compared between learning rates, but not between coefficients or families.

    Args:
        setting: The study's setting; results are kept in its folder.
        families: Families to tune.
        learning_rates: The grid.
        steps: Optimizer steps of each run.
    """
    folder = setting.folder / "tuning"
    path = folder / "objective.json"
    middle = {family.name: family.middle for family in families}
    names = {f"{family.name}-lr={lr}": (family, lr) for family in families for lr in learning_rates}
    shorter = copy(setting)
    shorter.steps = steps
    if not path.is_file():
        members = [
            family.member(shorter, name, middle[family.name], lr)
            for name, (family, lr) in names.items()
        ]
        watching = HeldOutObjective(setting.held_out_tokens, path)
        train_together(shorter, folder, members, seed=SEED, watching=[watching])
    found = json.loads(path.read_text())
    objective = {
        family.name: {lr: found.get(f"{family.name}-lr={lr}") for lr in learning_rates}
        for family in families
    }
    return Tuned(objective, middle)


class HeldOutObjective(Callback):
    """Writes the held-out objective of each SAE that is trained side by side, at the end.

    It is the mean over held-out activations in the space of training, in which the coefficients of
    penalties are given.

    Args:
        n_tokens: Held-out tokens to read.
        path: A JSON file for the objectives by member.
    """

    def __init__(self, n_tokens: int, path: Path) -> None:
        self.n_tokens, self.path = n_tokens, path

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SideBySide)
        sums = dict.fromkeys((member.name for member in pl_module.active), 0.0)
        count = 0
        for x in HeldOutBatches(trainer.datamodule, self.n_tokens):  # type: ignore[attr-defined]
            count += len(x)
            for member in pl_module.active:
                sums[member.name] += len(x) * objective(member.sae, x)
        write_json(self.path, {name: total / count for name, total in sums.items()})


@torch.no_grad()
def objective(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    """All terms of the loss on raw activations [batch, d_in], mean over the batch."""
    return float(sum(sae.objective(sae.scaled(x)).losses.values()))
