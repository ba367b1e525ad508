"""Base of callbacks that scale a part of the loss by a schedule."""

from abc import abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import refuse_second
from lightning_sae.training.lengths import refuse_lengths


class ScheduledScale(Callback):
    """Sets an attribute of the SAE to a scale between 0 and 1 that depends on the optimizer step.

    Micro-batches of one step have the same scale. A resumed fit continues the schedule; any other
    fit restarts it. After the fit the scale is 1. It is logged as `train/` and the attribute's
    name.

    Attributes:
        scale: Name of the attribute.
        length_names: Names of arguments that are lengths, in steps or as shares of the run.
    """

    scale: ClassVar[str]
    length_names: tuple[str, ...]
    _total = -1  # steps of the run, once it is known
    _began: int | None = None

    @abstractmethod
    def share(self, steps_taken: int) -> float:
        """The scale in the step after `steps_taken` steps of the fit."""

    @abstractmethod
    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a ValueError if the SAE has nothing to scale."""

    @abstractmethod
    def length_problems(self, total: int) -> list[str]:
        """Error messages about the lengths in a run of `trainer.max_steps`."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the SAE and reset the state; a resume loads its state after this."""
        if stage != "fit":
            return
        self._began, self._total = None, trainer.max_steps
        self.refuse(trainer, pl_module)
        refuse_second(trainer, self)
        refuse_lengths(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step at which the schedule starts, unless a checkpoint has it."""
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
        """Set the scale of the current step."""
        assert self._began is not None
        # The number of optimizer steps so far, the same for all micro-batches of a step.
        share = self.share(trainer.global_step - self._began)
        setattr(pl_module, self.scale, share)
        pl_module.log(f"train/{self.scale}", share)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the scale to 1."""
        setattr(pl_module, self.scale, 1.0)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Set the scale to 1."""
        setattr(pl_module, self.scale, 1.0)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step at which the schedule started."""
        return {"began": self._began}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the schedule of a checkpoint."""
        self._began = state_dict["began"]
