"""What SAEs and callbacks ask of the data that they are trained on."""

from collections.abc import Sequence
from typing import Any, TypeVar

from jaxtyping import Float
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_sae.data.scaling import Scaling

S = TypeVar("S", bound="ActivationSource")


class ActivationSource(LightningDataModule):
    """A data module of activations that says what they are.

    Any data of batches [batch, d_in] trains an SAE. A source also gives the SAE its width before
    the first batch, what is written into saved files, and a scaling. A subclass sets `d_in` and
    gives Lightning's dataloaders; everything else has a default.

    Attributes:
        d_in: Width of the activations; a dictionary by hook where there are several.
        hook_names: Names of the hooks, where there are any. Of several, a batch is a dictionary of
            tensors by hook.
    """

    d_in: Any  # an integer, except for `SideBySide`
    hook_names: Sequence[str] = ()

    @property
    def source(self) -> dict[str, Any]:
        """Where the activations come from, as plain values that are saved with an SAE."""
        return {}

    def scaling(self) -> Scaling | None:
        """Centring and scaling that an SAE adopts before its first step; None for neither.

        With several ranks, all have to call it.
        """
        return None

    def at(self: S, hook_name: str) -> S:
        """The same data with one of its hooks alone; data with several hooks has to give it."""
        if len(self.hook_names) > 1:
            raise NotImplementedError(f"{type(self).__name__} has no `at` for hook {hook_name}.")
        return self

    def text_data(self) -> Any:
        """An `ActivationDataModule` that reads these activations from text, for what needs a model.

        None where there is no language model.

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
        """Counts of what was read so far, for the logs."""
        return {}

    def seconds(self) -> dict[str, float]:
        """Seconds that parts of the data have taken in this process, for the logs.

        `buffer` are those in which the next batch was waited for, `language_model` those in which
        the model ran, which may be at the same time.
        """
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, or for another process: all but the trainer, which belongs to a run."""
        return {**vars(self), "trainer": None}


def source_of(trainer: Trainer) -> ActivationSource | None:
    """The data of a run, if it is an `ActivationSource`."""
    data = getattr(trainer, "datamodule", None)  # only there if the run was given a data module
    return data if isinstance(data, ActivationSource) else None
