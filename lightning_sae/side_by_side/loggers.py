"""The loggers of the members of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from typing_extensions import override


def loggers_of(run: Sequence[Logger], name: str) -> list[Logger]:
    """A logger for a member, for each logger of the run.

    TensorBoard shows each member as a separate run, from a folder inside the run's. In other
    loggers the names of values start with the member's name.
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
        """Log nothing: the run's configuration has those of all members."""
