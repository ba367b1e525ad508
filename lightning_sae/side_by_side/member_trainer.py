"""The trainer as one member of a run sees it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.data.source import source_of
from lightning_sae.side_by_side.loggers import loggers_of


class MemberTrainer(Trainer):
    """A view of the run's trainer: what is a member's own stands here, all else is the run's.

    Its own are the SAE, callbacks, optimizers, the hook's data, loggers, metrics, a folder in the
    run's, and the count of steps, which ends where the member stops. What a callback of the member
    sets here the run takes no notice of.

    Args:
        run: The trainer of the whole run.
        name: The member's name.
        sae: Its SAE.
        callbacks: Its callbacks.
        hook_name: Its hook; None if the data has but one.
    """

    def __init__(
        self,
        run: Trainer,
        name: str,
        sae: LightningModule,
        callbacks: list[Callback],
        hook_name: str | None,
    ) -> None:
        # A view is no trainer of its own, so the base class is not initialised.
        self._run_of_all = run
        self._sae, self._hook_name = sae, hook_name
        self.callbacks = callbacks
        self._default_root_dir = str(Path(run.default_root_dir) / "members" / name)
        self._loggers = loggers_of(run.loggers, name)
        self.optimizers = []
        self.stopped_at: int | None = None
        self._metrics: dict[str, Tensor | float] = {}
        self._unwritten: dict[str, Tensor | float] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "_run_of_all":  # not yet set, as while it is copied
            raise AttributeError(name)
        return getattr(self._run_of_all, name)

    @property
    def should_stop(self) -> bool:
        """Whether the run is to end."""
        return self._run_of_all.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value and not self._run_of_all.should_stop:
            raise ValueError(
                "Expected a member's callbacks to leave `trainer.should_stop` alone, which would "
                "end the run of all members, but one set it: move it to `trainer.callbacks`."
            )

    @property
    @override
    def lightning_module(self) -> LightningModule:
        """The member's SAE."""
        return self._sae

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        """The member's own."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, new_optims: list[Optimizer]) -> None:
        self._optimizers = new_optims

    @property
    def datamodule(self) -> Any:
        """The run's data, at the member's hook."""
        data = source_of(self._run_of_all)
        if data is None or self._hook_name is None:
            return self._run_of_all.datamodule  # type: ignore[attr-defined]
        return data.at(self._hook_name)

    @property
    @override
    def global_step(self) -> int:
        """Optimizer steps that the member has taken."""
        return self._run_of_all.global_step if self.stopped_at is None else self.stopped_at

    @property  # type: ignore[misc]  # it cannot be set
    @override
    def ckpt_path(self) -> str | Path | None:
        """Where a checkpoint of the member alone would lie, if the run has one; there is none."""
        resumed = self._run_of_all.ckpt_path is not None
        return Path(self._default_root_dir) / "none.ckpt" if resumed else None

    # Logs. Lightning's own serve one module per run, and take their time for each value.

    @property
    @override
    def callback_metrics(self) -> dict[str, Tensor]:
        """The latest of each value that was logged."""
        return {name: torch.as_tensor(value) for name, value in self._metrics.items()}

    @property
    @override
    def logged_metrics(self) -> dict[str, Tensor]:
        """As `callback_metrics`."""
        return self.callback_metrics

    def log(self, name: str, value: Any, *_: Any, logger: bool | None = None, **__: Any) -> None:
        """What `LightningModule.log` does for a module alone, with values as of the step."""
        value = value.detach() if isinstance(value, Tensor) else value
        self._metrics[name] = value
        if logger is not False:
            self._unwritten[name] = value

    def log_dict(self, dictionary: dict[str, Any], *_: Any, **kwargs: Any) -> None:
        """What `LightningModule.log_dict` does."""
        for name, value in dictionary.items():
            self.log(name, value, **kwargs)

    def write_logs(self, step: int) -> None:
        """Hand over to the loggers what was logged since the last time."""
        if self._unwritten and not self.sanity_checking:
            # In single precision, as Lightning has them.
            values = {name: torch.as_tensor(v).item() for name, v in self._unwritten.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=step)
        self._unwritten = {}

    def close(self) -> None:
        """Write what loggers still hold."""
        for logger in self.loggers:
            logger.finalize("success")
