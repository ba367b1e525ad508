"""Agreement between ranks: equal configurations, reductions, and each rank's own files.

Each rank evaluates the objective on its own batch, and Lightning's strategy averages gradients.
That is the gradient of all batches together for every term that is a mean over rows. Terms that are
not a mean over rows (a selection among all rows, a ratio of sums, the square of a mean) are reduced
over the ranks through `Ranks`. Batches have the same size on all ranks.

With a split dictionary several ranks hold one copy and have one batch. `Ranks` then speaks of the
copies, and `Parts` of the ranks that hold one (`lightning_sae.distributed.parts`).

The number of batches is also equal. The data modules of this package never end. With other loaders,
an epoch ends on all ranks when the shortest loader ends; validation loaders must have equal
lengths.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sae.checkpoints import read_checkpoint
from lightning_sae.distributed.parts import Parts
from lightning_sae.distributed.split import Copies, copies_of
from lightning_sae.files import write_atomically


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to; None in a user's own loop, or with Fabric.

    Raises:
        ValueError: With Fabric on several ranks, because reductions over ranks need a trainer.
    """
    if module.fabric is not None:
        if module.fabric.world_size > 1:
            raise ValueError(
                f"Expected Fabric to have one device but got {module.fabric.world_size}: train an "
                'SAE on several ranks with `Trainer(strategy="ddp")`.'
            )
        return None
    try:
        return module.trainer
    except RuntimeError:  # Lightning's error if there is none
        return None


class Ranks:
    """The copies of a module in training, one on each rank, or with a split dictionary on several.

    All ranks must call these methods in the same order. Outside of training, and with one copy,
    each method returns its argument.

    Args:
        module: This rank's copy.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    @property
    def _copies(self) -> Copies:
        trainer = trainer_of(self._module)
        return Copies(0, 1) if trainer is None or not trainer.training else copies_of(trainer)

    @property
    def n(self) -> int:
        """Number of copies in training."""
        return self._copies.n

    @property
    def index(self) -> int:
        """Which of them this is."""
        return self._copies.own

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks, without a gradient."""
        return self._reduced(value, "mean")

    def least(self, value: Tensor) -> Tensor:
        """The least of all ranks, elementwise."""
        return self._reduced(value, "min")

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self._reduced(value, "sum")

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        copies = self._copies
        if copies.n == 1:
            return value
        # On a copy, because `reduce` works in place.
        value = value.detach().to(self._module.device, copy=True)
        return self._module.trainer.strategy.reduce(value, copies.group, reduce_op=operation)

    def mean_with_gradient(self, value: Tensor) -> Tensor:
        """The mean over all ranks, with the gradient of this rank's share.

        For a function of this mean, each rank computes its share of the gradient. The strategy's
        mean over ranks is then the whole gradient.
        """
        return value if self.n == 1 else value + (self.mean(value) - value.detach())

    def gathered(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "ranks ..."]:
        """The tensors of all ranks, in order of rank."""
        copies = self._copies
        if copies.n == 1:
            return values.unsqueeze(0)
        return self._module.trainer.strategy.all_gather(values, copies.group)

    def shorten_epoch(self) -> bool:
        """Limit all ranks to the number of batches of the shortest loader, where that is known.

        Lightning trains each rank on all of its batches: without this, and without
        `end_with_the_first`, ranks with more batches wait forever for the gradients of the others
        (`tests/ranks/test_agreement.py` has such a run). Lightning has no public interface for
        this, so its `max_batches` and `is_last_batch` are set.

        Returns:
            Whether a length is unknown: then call `end_with_the_first` with each batch.
        """
        if self.n == 1:
            return False
        trainer = self._module.trainer
        # The attribute is missing if validation runs by time.
        loop, share = trainer.fit_loop, getattr(trainer, "val_check_interval", None)
        own = torch.tensor(float(loop.max_batches))
        least, most = self.least(own), -self.least(-own)
        if least != most and not most.isinf():
            loop.max_batches = int(least)
            if isinstance(share, float):
                trainer.val_check_batch = max(1, int(share * loop.max_batches))
        return bool(most.isinf())

    def end_with_the_first(self) -> None:
        """End the epoch on all ranks when the first rank reaches its last batch."""
        progress = self._module.trainer.fit_loop.epoch_loop.batch_progress
        is_last = self.sum(torch.tensor(float(progress.is_last_batch)))
        # Lightning reads this to step with accumulated gradients, to validate and to end.
        progress.is_last_batch = bool(is_last > 0)


class Devices:
    """All devices of a run: the parts of each copy, one copy after the other.

    Args:
        ranks: The copies.
        parts: The parts of a copy.
    """

    def __init__(self, ranks: Ranks, parts: Parts) -> None:
        self._ranks, self._parts = ranks, parts
        self.n = ranks.n * parts.n
        self.index = ranks.index * parts.n + parts.index

    def gathered(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "devices ..."]:
        """The tensors of all devices."""
        return self._ranks.gathered(self._parts.gathered(values)).flatten(0, 1)

    def least(self, value: Tensor) -> Tensor:
        """The least of all devices, elementwise."""
        return self._ranks.least(self._parts.least(value))


def require_agreement(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError on all ranks unless all have the same settings.

    Args:
        trainer: Provides the number of ranks; with one, nothing is compared.
        settings: Plain values by name, possibly nested.
    """
    if trainer.world_size == 1:
        return
    of_all: list[dict[str, str]] = [{}] * trainer.world_size
    torch.distributed.all_gather_object(of_all, flat(settings))
    names = sorted({name for settings in of_all for name in settings})
    differing = [name for name in names if len({own.get(name) for own in of_all}) > 1]
    if differing:
        values = (", ".join(f"{own.get(name)}" for own in of_all) for name in differing)
        pairs = "; ".join(f"`{name}`: {each}" for name, each in zip(differing, values, strict=True))
        raise ValueError(
            "Expected all ranks to have one configuration but, from rank 0 on, they have "
            f"{pairs}. Start them all with the same arguments and files."
        )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, as text.

    Items of a list are named by their `name` if they have one, otherwise by index.

    Example:
        >>> flat({"model": {"d_sae": 8, "betas": (0.9, 0.99)}, "seed": None})
        {'model.d_sae': '8', 'model.betas': '(0.9, 0.99)', 'seed': 'None'}
        >>> flat({"members": [{"name": "relu", "lr": 0.1}], "callbacks": [{"n_steps": 5}]})
        {'members.relu.name': 'relu', 'members.relu.lr': '0.1', 'callbacks.0.n_steps': '5'}
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
            value = {str(part.get("name", i)): part for i, part in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            # Without memory addresses, which differ between processes.
            found[f"{prefix}{name}"] = re.sub(" at 0x[0-9a-f]+", "", str(value))
    return found


# State that differs between ranks is stored in files beside the checkpoint. Rank 0 writes the
# checkpoint: weights, moments and schedules, which are the same on all ranks, and its own state,
# such as its buffer and its position in the text. Each other rank writes its own state beside it,
# for `last.ckpt` into `last.ckpt.step-400.rank-1`. All these files are complete before the
# checkpoint replaces an earlier one, and files of earlier steps are removed only afterwards, so a
# killed run always leaves the files that belong to the checkpoint.

SHARED = {"state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters", "settings"}
"""Entries of a checkpoint that are the same on all ranks."""


def part_of(path: Path, step: int, rank: int) -> Path:
    """The file of a rank beside the checkpoint of some step."""
    return path.with_name(f"{path.name}.step-{step}.rank-{rank}")


def write_part(path: Path, rank: int, checkpoint: dict[str, Any]) -> None:
    """Write a rank's own state beside the checkpoint of rank 0 at `path`."""
    own = {name: value for name, value in checkpoint.items() if name not in SHARED}
    part = part_of(path, checkpoint["global_step"], rank)
    write_atomically(part, lambda temporary: torch.save(own, temporary))


def take_part(path: Path, rank: int, checkpoint: dict[str, Any]) -> None:
    """Merge a rank's own state, if any, into the checkpoint read from `path`."""
    part = part_of(path, checkpoint["global_step"], rank)
    if part.is_file():
        checkpoint.update(read_checkpoint(part))


def remove_other_parts(path: Path, step: int) -> None:
    """Remove the ranks' files of earlier checkpoints at `path`."""
    for part in path.parent.glob(f"{path.name}.step-*.rank-*"):
        if not part.name.startswith(f"{path.name}.step-{step}."):
            part.unlink(missing_ok=True)
