"""Lengths of the parts of a run: a number of optimizer steps, or a share of the run."""

from numbers import Integral

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Protocol, runtime_checkable

from lightning_sae.checks import refuse

Length = int | float
"""Optimizer steps, as `200`, or a share of `trainer.max_steps` between 0 and 1, as `0.05`."""


def is_share(length: Length) -> bool:
    """Whether a length is a share of the run."""
    return isinstance(length, float)


def require_lengths(least: int, **values: Length) -> None:
    """Raise a ValueError if an argument is neither a share nor at least `least` steps."""
    for name, value in values.items():
        if isinstance(value, float):
            holds = 0 < value < 1
        else:
            holds = isinstance(value, Integral) and not isinstance(value, bool) and value >= least
        if not holds:
            refuse(
                f"Expected argument `{name}` to be at least {least} and a whole number of steps, "
                f"or a share of the run between 0 and 1, but got {value}."
            )


def steps_of(length: Length, total: int, name: str) -> int:
    """Optimizer steps of a length in a run of `total`. A share is rounded, to one step or more.

    Args:
        length: Steps, or a share of the run.
        total: The run's `trainer.max_steps`.
        name: The argument's name, for the error.

    Raises:
        ValueError: If it is a share of a run of unknown length.

    Example:
        >>> [steps_of(length, 50, "n_steps") for length in (20, 0.3, 0.001)]
        [20, 15, 1]
    """
    if not is_share(length):
        return int(length)
    for problem in unknown(total, **{name: length}):
        raise ValueError(problem)
    return max(1, round(length * total))


def two_steps_of(
    first: Length, second: Length, total: int, names: tuple[str, str]
) -> tuple[int, int]:
    """The same for two lengths. Shares whose sum is at most 1 always fit into the run.

    Example:
        >>> two_steps_of(0.5, 0.5, 3, ("delay_steps", "warmup_steps"))
        (2, 1)
    """
    one, other = steps_of(first, total, names[0]), steps_of(second, total, names[1])
    if is_share(first) and is_share(second) and first + second <= 1:
        other = min(other, total - one)
    return one, other


def unknown(total: int, **lengths: Length) -> list[str]:
    """A message for each share, if the length of the run is unknown."""
    return [
        f"`{name}`={length} is a share of the run and needs one of known length, but "
        f"`trainer.max_steps` is {total}: set `trainer.max_steps`, or give a number of steps."
        for name, length in lengths.items()
        if is_share(length) and total <= 0
    ]


@runtime_checkable
class HasLengths(Protocol):
    """A part of a run that has lengths as arguments, kept under their names.

    Attributes:
        length_names: Names of these arguments.
    """

    length_names: tuple[str, ...]

    def length_problems(self, total: int) -> list[str]:
        """Messages on invalid lengths in a run of `total` steps, one each."""


def refuse_lengths(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise one ValueError with the messages on all invalid lengths.

    Called once, by the first part that is set up. `fast_dev_run` accepts any length.
    """
    if problems := problems_of_lengths(trainer, pl_module):
        raise ValueError("\n".join(problems))


def problems_of_lengths(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Messages on all invalid lengths of a run, of its module and callbacks."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    parts = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
    found = [part for part in parts if isinstance(part, HasLengths)]
    return [problem for part in found for problem in part.length_problems(trainer.max_steps)]
