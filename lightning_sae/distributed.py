"""What the ranks of a run find out together: one configuration, means, and files of their own.

Each rank evaluates the objective on its own batch, and Lightning's strategy averages gradients.
That is the gradient of all batches together for every term that is a mean over rows. What is not a
mean over rows (a selection among all rows, a ratio of sums, the square of a mean) asks the other
ranks through `Ranks`. Ranks have batches of equal size.

They also have equally many. The data modules of this package never end. With other loaders an epoch
ends for all ranks with the shortest; validation loaders must have one length.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sae.files import read_checkpoint, write_atomically


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to; None in a loop of the user's own, or of Fabric.

    Raises:
        ValueError: With Fabric on several ranks: what they find out together needs a trainer.
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
    except RuntimeError:  # so Lightning says that there is none
        return None


class Ranks:
    """The copies of a module that are being trained, one on each rank.

    All ranks must call these methods in the same order. Outside of training, and on one rank, each
    method returns its argument.

    Args:
        module: This rank's copy.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    @property
    def n(self) -> int:
        """Copies that are being trained."""
        trainer = trainer_of(self._module)
        return 1 if trainer is None or not trainer.training else trainer.world_size

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks, a constant to the gradient."""
        return self._reduced(value, "mean")

    def least(self, value: Tensor) -> Tensor:
        """The least of all ranks, elementwise."""
        return self._reduced(value, "min")

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self._reduced(value, "sum")

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        if self.n == 1:
            return value
        # On a copy, for `reduce` works in place.
        value = value.detach().to(self._module.device, copy=True)
        return self._module.trainer.strategy.reduce(value, reduce_op=operation)

    def mean_with_gradient(self, value: Tensor) -> Tensor:
        """The mean over all ranks, whose gradient is that of this rank's share of it.

        Of a function of this mean each rank has its own share of the gradient, and the mean over
        ranks, which the strategy takes, is the whole gradient.
        """
        return value if self.n == 1 else value + (self.mean(value) - value.detach())

    def gathered(self, values: Float[Tensor, " n"]) -> Float[Tensor, "ranks n"]:
        """The vectors of all ranks, in the order of the ranks."""
        if self.n == 1:
            return values.unsqueeze(0)
        return self._module.trainer.strategy.all_gather(values)

    def shorten_epoch(self) -> bool:
        """Have all ranks train on as many batches as the shortest loader has, where that is known.

        Lightning trains on as many as each rank has: without this, and without
        `end_with_the_first`, ranks with more batches wait for ever for the gradients of the others
        (`tests/ranks/test_agreement.py` has such a run). So Lightning's `max_batches` and
        `is_last_batch` are set, which it has no other way to be told.

        Returns:
            Whether a length is not known: then call `end_with_the_first` with each batch.
        """
        if self.n == 1:
            return False
        trainer = self._module.trainer
        # Where validation goes by the clock there is no such attribute.
        loop, share = trainer.fit_loop, getattr(trainer, "val_check_interval", None)
        own = torch.tensor(float(loop.max_batches))
        least, most = self.least(own), -self.least(-own)
        if least != most and not most.isinf():
            loop.max_batches = int(least)
            if isinstance(share, float):
                trainer.val_check_batch = max(1, int(share * loop.max_batches))
        return bool(most.isinf())

    def end_with_the_first(self) -> None:
        """End the epoch on all ranks with the last batch of the first rank to end."""
        progress = self._module.trainer.fit_loop.epoch_loop.batch_progress
        is_last = self.sum(torch.tensor(float(progress.is_last_batch)))
        # What Lightning reads to step with accumulated gradients, to validate and to end.
        progress.is_last_batch = bool(is_last > 0)


def require_agreement(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError on all ranks unless all have the same settings.

    Args:
        trainer: Says how many ranks there are; with one there is nothing to compare.
        settings: Plain values by name, nested or not.
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
    """Settings by their dotted names, as text.

    Parts of a list are counted, or called by the name that they have.

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
            # Without addresses, for these belong to a process.
            found[f"{prefix}{name}"] = re.sub(" at 0x[0-9a-f]+", "", str(value))
    return found


# What only one rank knows of a run, in a file beside the checkpoint. Rank 0 writes the checkpoint:
# weights, moments and schedules, which are the same on all ranks, and what rank 0 alone has, such
# as its buffer and its place in the text. Each other rank writes its own of these beside it,
# `last.ckpt` having `last.ckpt.step-400.rank-1`. All parts are complete before the checkpoint
# replaces an earlier one, and parts of earlier steps are removed only after it: whenever a run is
# killed, the checkpoint's own parts are there.

SHARED = {"state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters", "settings"}
"""Entries of a checkpoint that are the same on all ranks."""


def part_of(path: Path, step: int, rank: int) -> Path:
    """The file of a rank beside the checkpoint of some step."""
    return path.with_name(f"{path.name}.step-{step}.rank-{rank}")


def write_part(path: Path, rank: int, checkpoint: dict[str, Any]) -> None:
    """Write what a rank's own checkpoint holds beyond the one of rank 0 at `path`."""
    own = {name: value for name, value in checkpoint.items() if name not in SHARED}
    part = part_of(path, checkpoint["global_step"], rank)
    write_atomically(part, lambda temporary: torch.save(own, temporary))


def take_part(path: Path, rank: int, checkpoint: dict[str, Any]) -> None:
    """Put a rank's own entries into the checkpoint that was read from `path`, if it has any."""
    part = part_of(path, checkpoint["global_step"], rank)
    if part.is_file():
        checkpoint.update(read_checkpoint(part))


def remove_other_parts(path: Path, step: int) -> None:
    """Remove what was written beside earlier checkpoints at `path`."""
    for part in path.parent.glob(f"{path.name}.step-*.rank-*"):
        if not part.name.startswith(f"{path.name}.step-{step}."):
            part.unlink(missing_ok=True)
