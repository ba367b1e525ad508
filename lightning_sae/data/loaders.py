"""Endless loaders for Lightning, and checks that a run on them ends."""

import warnings
from collections import UserList
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer
from torch import Tensor

from lightning_sae.data.buffer import ShuffleBuffer

Rows = Any
"""Activations [batch, d_in] of one hook, or a dictionary of them by hook if there are several.

Typed as `Any`: with one hook it is used as a tensor, with several as a dictionary.
"""

ENDLESS = 2**40
"""Length of an endless loader: more than any run has, few enough to sum over ranks."""


class EndlessBatches:
    """Batches of a buffer for as long as the trainer asks.

    Lightning asks a loader of unknown length for one batch more than it trains on, which a
    checkpoint would then count as used. So the loader has a length that is never reached. Iterating
    again continues where the last iteration stopped. The data module saves the buffer and the
    stream; the loader's state is only the number of rows served.

    Args:
        buffer: Where the batches come from.
        given_as: Converts the rows of a batch to what the loader returns.
    """

    def __init__(self, buffer: ShuffleBuffer, given_as: Callable[[Tensor], Rows]) -> None:
        self.buffer, self.given_as = buffer, given_as

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Rows]:
        return map(self.given_as, self.buffer)

    def state_dict(self) -> dict[str, int]:
        """Rows served by the present buffer."""
        return {"served": self.buffer.served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to do: the data module restores the buffer."""


def as_asked_for(batches: Iterable[Rows], trainer: Any) -> Iterable[Rows]:
    """All batches, or with `trainer.overfit_batches` the first ones repeatedly."""
    n = _overfit_batches(trainer)
    # Not a plain list, which Lightning would treat as a list of loaders.
    return UserList(islice(batches, n)) if n else batches


def begins_anew(trainer: Any, batch_size: int, present: int | None) -> bool:
    """Whether the stream must restart when Lightning asks for a loader.

    It does if the batch size has changed, as `BatchSizeFinder` does, and with
    `trainer.overfit_batches`, which uses the first batches also on resume.

    Args:
        trainer: The trainer of the run.
        batch_size: Activations in a batch.
        present: Batch size of the current stream; None without one.
    """
    return _overfit_batches(trainer) > 0 or present not in (None, batch_size)


def _overfit_batches(trainer: Any) -> int:
    return 0 if trainer is None else int(trainer.overfit_batches)


def require_an_end(trainer: Any, batch_size: int) -> None:
    """Check that a run on an endless stream ends, and that nothing waits for the end of an epoch.

    Lightning sets `min_epochs` to 1 if `min_steps` is given. As the epoch never ends, neither
    `EarlyStopping` nor `max_time` could then stop the run, so it is set to 0.

    Args:
        trainer: The trainer of the run; None in a user's own training loop.
        batch_size: Activations in a batch.

    Raises:
        ValueError: If the run has no end, or something waits for the end of an epoch, which never
            comes.
    """
    if trainer is None:
        return
    _require_numbers(trainer)
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
    has_epochs = isinstance(trainer.limit_train_batches, int)
    if not (trainer.max_steps > 0 or timed or has_epochs):
        raise ValueError(
            "The stream of activations has no end: set `trainer.max_steps` to the number of "
            f"optimizer steps, each on {batch_size} activations, or `trainer.limit_train_batches` "
            "to the number of batches that shall count as an epoch."
        )
    if has_epochs:
        return
    if trainer.min_steps:
        trainer.fit_loop.min_epochs = 0
    if waiting := _at_ends_of_epochs(trainer):
        raise ValueError(
            f"{', '.join(waiting)} would act at the end of an epoch, but the stream has no end: "
            "set `trainer.limit_train_batches` to the number of batches that shall count as an "
            "epoch, or go by steps: `trainer.max_steps`, `min_steps` and `val_check_interval`."
        )
    # The attribute is missing if `val_check_interval` is a time.
    each_epoch = isinstance(getattr(trainer, "val_check_interval", None), float)
    if each_epoch and trainer.limit_val_batches:
        warnings.warn(
            "Validation would come at the end of an epoch, but the stream has no end: set "
            "`trainer.val_check_interval` to a number of batches and "
            "`trainer.check_val_every_n_epoch` to null, or `trainer.limit_val_batches` to 0.",
            stacklevel=2,
        )


def _require_numbers(trainer: Any) -> None:
    """Raise a ValueError for a share of the stream, which has no length."""
    for name in ("overfit_batches", "limit_train_batches"):
        value = getattr(trainer, name)
        if isinstance(value, float) and 0 < value < 1:
            raise ValueError(
                f"Expected argument `trainer.{name}` to be a number of batches but got {value}, a "
                "share of a stream that has no end: give a number such as 100."
            )


def _at_ends_of_epochs(trainer: Any) -> list[str]:
    """Settings and callbacks that need the end of an epoch."""
    validates_at_ends = (
        getattr(trainer, "val_check_interval", None) == 1.0 and trainer.check_val_every_n_epoch == 1
    )
    found = {
        f"`max_epochs={trainer.max_epochs}`": trainer.max_epochs > 0,
        f"`min_epochs={trainer.min_epochs}`": bool(trainer.min_epochs),
        "`reload_dataloaders_every_n_epochs`": trainer.reload_dataloaders_every_n_epochs > 0,
    }
    for callback in trainer.callbacks:
        name = f"`{type(callback).__name__}`"
        if isinstance(callback, EarlyStopping):
            # None until its own `setup`, which then sets it to this.
            at_end = callback._check_on_train_epoch_end
            found[name] = validates_at_ends if at_end is None else at_end
        elif isinstance(callback, Timer):
            found[f'{name}(interval="epoch")'] = callback._interval == "epoch"
        elif isinstance(callback, GradientAccumulationScheduler):
            found[name] = any(epoch > 0 for epoch in callback.scheduling)
    return [name for name, is_so in found.items() if is_so]
