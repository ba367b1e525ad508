"""The loggers of the members of a run."""

from collections.abc import Sequence

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

from lightning_sae.callbacks.loggers import NamedValues


def loggers_of(run: Sequence[Logger], name: str) -> list[Logger]:
    """A logger for a member, for each logger of the run.

    TensorBoard shows each member as a separate run, from a folder inside the run's. In other
    loggers the names of values start with the member's name.
    """
    return [
        TensorBoardLogger(logger.log_dir, name="", version=name, default_hp_metric=False)
        if isinstance(logger, TensorBoardLogger)
        else NamedValues(logger, _allowed(logger, name))
        for logger in run
    ]


def _allowed(logger: Logger, name: str) -> str:
    """The name without characters that the logger refuses: MLflow refuses `=`."""
    return name.replace("=", " ") if isinstance(logger, MLFlowLogger) else name
