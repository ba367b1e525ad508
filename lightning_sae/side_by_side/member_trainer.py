"""The trainer that a member's SAE and callbacks get."""

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
    """The run's trainer as one member sees it.

    The SAE, callbacks, optimizer, data of the hook, loggers, metrics, folder and count of steps are
    the member's; the count ends where the member stops. Everything else is read from the run's
    trainer. Attributes that a member's callback sets here do not change the run's trainer.

    Args:
        run: The trainer of the whole run.
        name: The member's name.
        sae: Its SAE.
        callbacks: Its callbacks.
        hook_name: Its hook; None if the data has only one.
    """

    def __init__(
        self,
        run: Trainer,
        name: str,
        sae: LightningModule,
        callbacks: list[Callback],
        hook_name: str | None,
    ) -> None:
        # `Trainer.__init__` is not called: loops and strategy are those of the run.
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
                "Expected a member's callbacks not to set `trainer.should_stop`, which would end "
                "the run of all members, but one did: move it to `trainer.callbacks`."
            )

    @property
    @override
    def lightning_module(self) -> LightningModule:
        """The member's SAE."""
        return self._sae

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        """The member's optimizer."""
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
        """If the run is resumed, a path in the member's folder, which does not exist."""
        resumed = self._run_of_all.ckpt_path is not None
        return Path(self._default_root_dir) / "none.ckpt" if resumed else None

    # Logs. Lightning's own logging serves one module per run, and is slower for each value.

    @property
    @override
    def callback_metrics(self) -> dict[str, Tensor]:
        """The latest value logged under each name."""
        return {name: torch.as_tensor(value) for name, value in self._metrics.items()}

    @property
    @override
    def logged_metrics(self) -> dict[str, Tensor]:
        """As `callback_metrics`."""
        return self.callback_metrics

    def log(self, name: str, value: Any, *_: Any, logger: bool | None = None, **__: Any) -> None:
        """As `LightningModule.log` in a separate run; the values are those of the step."""
        value = value.detach() if isinstance(value, Tensor) else value
        self._metrics[name] = value
        if logger is not False:
            self._unwritten[name] = value

    def log_dict(self, dictionary: dict[str, Any], *_: Any, **kwargs: Any) -> None:
        """As `LightningModule.log_dict`."""
        for name, value in dictionary.items():
            self.log(name, value, **kwargs)

    def write_logs(self, step: int) -> None:
        """Pass the values that were logged since the last call to the loggers."""
        if self._unwritten and not self.sanity_checking:
            # In single precision, as Lightning has them.
            values = {name: torch.as_tensor(v).item() for name, v in self._unwritten.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=step)
        self._unwritten = {}

    def close(self) -> None:
        """Flush and close the loggers."""
        for logger in self.loggers:
            logger.finalize("success")
