"""Where each member of a run logs to."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from typing_extensions import override


def loggers_of(run: Sequence[Logger], name: str) -> list[Logger]:
    """A member's own logger for each of the run's.

    TensorBoard shows each member as a run of its own, from a folder inside the run's. In any other
    logger the member's name stands before that of the value.
    """
    return [
        TensorBoardLogger(logger.log_dir, name="", version=name)
        if isinstance(logger, TensorBoardLogger)
        else NamedValues(logger, name)
        for logger in run
    ]


class NamedValues(Logger):
    """Logs to another logger, each value as `member/value`.

    Args:
        logger: The other one.
        member: The member's name.
    """

    def __init__(self, logger: Logger, member: str) -> None:
        super().__init__()
        self.logger, self.member = logger, member

    @property
    @override
    def name(self) -> str | None:
        return self.logger.name

    @property
    @override
    def version(self) -> int | str | None:
        return self.logger.version

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logger.log_metrics({f"{self.member}/{k}": v for k, v in metrics.items()}, step)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's configuration holds those of all members."""
