"""What callbacks share that let a part of the loss come into force with the steps."""

from abc import abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import refuse_second
from lightning_sae.lengths import refuse_lengths


class ScheduledScale(Callback):
    """Sets an attribute of the SAE to a share that follows the optimiser's steps.

    Micro-batches of one step have one share. A resumed fit goes on where it was; any other fit
    starts anew. The SAE is left with the whole. The share is logged as `train/` and its name.

    Attributes:
        scale: The attribute's name.
        length_names: Arguments that are lengths, in steps or as shares of the run.
    """

    scale: ClassVar[str]
    length_names: tuple[str, ...]
    _total = -1  # steps of the run, once it is known
    _began: int | None = None

    @abstractmethod
    def share(self, steps_taken: int) -> float:
        """Share in force in the step after `steps_taken` steps of the fit."""

    @abstractmethod
    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a ValueError where the SAE does not fit."""

    @abstractmethod
    def length_problems(self, total: int) -> list[str]:
        """What is wrong with the lengths in a run of `trainer.max_steps`, an error each."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; forget an earlier fit (resuming loads its state after this)."""
        if stage != "fit":
            return
        self._began, self._total = None, trainer.max_steps
        self.refuse(trainer, pl_module)
        refuse_second(trainer, self)
        refuse_lengths(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the schedule begins, unless a checkpoint said so."""
        if self._began is None:
            self._began = trainer.global_step

    @override
    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Float[Tensor, "batch d_in"],
        batch_idx: int,
    ) -> None:
        """Set the share for the step in progress."""
        assert self._began is not None
        # The number of optimiser steps taken so far, the same for all micro-batches of a step.
        share = self.share(trainer.global_step - self._began)
        setattr(pl_module, self.scale, share)
        pl_module.log(f"train/{self.scale}", share)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the whole behind."""
        setattr(pl_module, self.scale, 1.0)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the whole behind."""
        setattr(pl_module, self.scale, 1.0)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step at which the schedule began."""
        return {"began": self._began}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the schedule that the checkpoint was in."""
        self._began = state_dict["began"]
