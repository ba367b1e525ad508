"""The loggers of the members of a run."""

from collections.abc import Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_sae.callbacks.loggers import NamedValues


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
