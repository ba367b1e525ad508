"""Where each member of a run logs to."""

from collections.abc import Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_sae.callbacks.loggers import NamedValues


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
