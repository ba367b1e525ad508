"""Images, histograms and text for loggers. What a logger cannot store is left out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import Protocol, override, runtime_checkable


@runtime_checkable
class HoldsFigures(Protocol):
    """A logger's `experiment` that accepts images, such as TensorBoard's."""

    def add_figure(self, tag: str, figure: Figure, global_step: int | None) -> Any:
        """Keep a picture."""


@runtime_checkable
class HoldsHistograms(Protocol):
    """A logger's `experiment` that accepts histograms, such as TensorBoard's."""

    def add_histogram(self, tag: str, values: Tensor, global_step: int | None) -> Any:
        """Keep a histogram."""


@runtime_checkable
class HoldsText(Protocol):
    """A logger's `experiment` that accepts text, such as TensorBoard's."""

    def add_text(self, tag: str, text_string: str, global_step: int | None) -> Any:
        """Store a text in Markdown."""


class NamedValues(Logger):
    """Logs to another logger, each value as `member/value`.

    Args:
        logger: The other logger.
        member: Prefix of the names, such as the name of one SAE among several.
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
        """No-op: the run's configuration has the hyper-parameters of all members."""


def hold_figures(loggers: Sequence[Logger]) -> bool:
    """Whether any logger accepts images."""
    return any(_holds_figures(_with_name(logger, "")[0]) for logger in loggers)


def log_figure(loggers: Sequence[Logger], name: str, figure: Figure, step: int) -> None:
    """Log an image to TensorBoard and similar loggers, to wandb, and to MLflow as a file."""
    for logger, own in (_with_name(logger, name) for logger in loggers):
        if isinstance(logger, WandbLogger):
            logger.log_image(own, [figure], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{own}/step-{step:07d}.png")
        elif isinstance(holder := _experiment(logger), HoldsFigures):
            holder.add_figure(own, figure, step)


def log_histograms(loggers: Sequence[Logger], values: Mapping[str, Tensor], step: int) -> None:
    """Log histograms of values to TensorBoard and similar loggers, and to wandb."""
    for logger in loggers:
        for name, each in values.items():
            keeper, own = _with_name(logger, name)
            if isinstance(keeper, WandbLogger):
                import wandb  # installed if its logger is used

                of_wandb: Any = wandb.Histogram(np_histogram=histogram(each))
                keeper.log_metrics({own: of_wandb}, step)
            elif isinstance(holder := _experiment(keeper), HoldsHistograms):
                holder.add_histogram(own, each, step)


def histogram(values: Tensor, bins: int = 64) -> tuple[Any, Any]:
    """Counts and bin edges, in double precision so that nearly equal values have distinct bins."""
    return np.histogram(values.detach().cpu().double().numpy(), bins=bins)


def log_table(
    loggers: Sequence[Logger],
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    step: int,
) -> None:
    """Log a table of texts to TensorBoard and the like, to wandb, and to MLflow as a file."""
    for logger, own in (_with_name(logger, name) for logger in loggers):
        if isinstance(logger, WandbLogger):
            logger.log_text(own, list(columns), [list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            lines = ["\t".join(row) for row in (columns, *rows)]
            logger.experiment.log_text(logger.run_id, "\n".join(lines) + "\n", f"{own}.tsv")
        elif isinstance(holder := _experiment(logger), HoldsText):
            holder.add_text(own, _in_markdown(columns, rows), step)


def writers(loggers: Sequence[Logger]) -> list[Any]:
    """TensorBoard's own writers, for its special features."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _with_name(logger: Logger, name: str) -> tuple[Any, str]:
    """The underlying logger, and the name under which it stores values."""
    if isinstance(logger, NamedValues):
        return _with_name(logger.logger, f"{logger.member}/{name}")
    return logger, name


def _experiment(logger: Any) -> Any:
    """A logger's `experiment`; Lightning does not require it, and some loggers have none."""
    return logger.experiment if hasattr(logger, "experiment") else None


def _holds_figures(logger: Any) -> bool:
    known = isinstance(logger, WandbLogger | MLFlowLogger)
    return known or isinstance(_experiment(logger), HoldsFigures)


def _in_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text with the special characters of Markdown and HTML escaped.

    Example:
        >>> _escaped("a_b <i>")
        'a&#95;b &#60;i&#62;'
    """
    return "".join(c if c.isalnum() or c == " " or ord(c) > 127 else f"&#{ord(c)};" for c in text)
