"""The interface that SAEs and callbacks need from a data module."""

from collections.abc import Sequence
from typing import Any, TypeVar

from jaxtyping import Float
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_sae.data.scaling import Scaling

S = TypeVar("S", bound="ActivationSource")


class ActivationSource(LightningDataModule):
    """Base class of data modules that yield activations.

    Any dataloader with batches [batch, d_in] can train an SAE. A source also provides the width
    before the first batch, a description for saved files, and a scaling. A subclass sets `d_in` and
    defines Lightning's dataloaders; everything else has a default.

    Attributes:
        d_in: Width of the activations; a dictionary by hook where there are several.
        hook_names: Names of the hooks, if any. With several, a batch is a dictionary of tensors by
            hook.
    """

    d_in: Any  # an integer, except for `SideBySide`
    hook_names: Sequence[str] = ()

    @property
    def source(self) -> dict[str, Any]:
        """Where the activations come from, as plain values that are saved with an SAE."""
        return {}

    def scaling(self) -> Scaling | None:
        """Centring and scaling that an SAE copies before its first step; None for neither.

        With several ranks, every rank must read it.
        """
        return None

    def at(self: S, hook_name: str) -> S:
        """The same data with only one of its hooks; required of data with several hooks."""
        if len(self.hook_names) > 1:
            raise NotImplementedError(f"{type(self).__name__} has no `at` for hook {hook_name}.")
        return self

    def text_data(self) -> Any:
        """An `ActivationDataModule` that reads these activations from text by a language model.

        None if there is no language model.

        Raises:
            ValueError: If the model or the text that the data names cannot be opened.
        """
        return None

    def unseen(self, n: int) -> Float[Tensor, "n d_in"] | None:  # noqa: ARG002
        """Activations that no training step has seen; called when training is over.

        The state that a checkpoint saves must not depend on it.

        Args:
            n: Number of activations, on each rank.

        Returns:
            Exactly that many, or None if the data cannot give any.
        """
        return None

    def statistics(self) -> dict[str, float]:
        """Counts of what has been read so far, for the logs."""
        return {}

    def seconds(self) -> dict[str, float]:
        """Seconds that parts of the data have taken in this process, for the logs.

        `buffer` counts the time spent waiting for the next batch, `language_model` the time the
        model ran. The two may overlap.
        """
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or another process: all but the trainer, which belongs to a run."""
        return {**vars(self), "trainer": None}


def source_of(trainer: Trainer) -> ActivationSource | None:
    """The data of a run, if it is an `ActivationSource`."""
    data = getattr(trainer, "datamodule", None)  # missing if the run has no data module
    return data if isinstance(data, ActivationSource) else None


def activations_in(batch: Any) -> int:
    """Number of activations in a batch; several hooks have equally many; None has none."""
    if batch is None:
        return 0
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
