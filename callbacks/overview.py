"""An overview of a run: its settings beside its metrics, and the most important charts."""

import inspect
from numbers import Real
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_sae.callbacks.loggers import NamedValues, writers
from lightning_sae.data.source import source_of
from lightning_sae.functional.penalties import plain_arguments

FIGURES = ("l0", "fvu", "dead_fraction", "loss_recovered_zero", "loss_recovered_mean", "ce_spliced")
"""Held-out metrics by which runs are compared, as `val/...` and, after a test, `test/...`."""

ALWAYS = ("d_sae", "lr", "l1_coefficient", "l0_coefficient", "k", "target_l0")
"""Arguments of an SAE in which runs of a sweep are likely to differ."""

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "SAE": {
        "L0, active latents per token": ["Multiline", ["train/l0$", "val/l0$"]],
        "FVU, share of the variance left": ["Multiline", ["val/fvu$"]],
        "Cross-entropy, nats per token": ["Multiline", ["val/ce_clean$", "val/ce_spliced$"]],
        "Loss recovered": [
            "Multiline",
            ["val/loss_recovered_zero$", "val/loss_recovered_mean$"],
        ],
        "Dead latents, share": ["Multiline", ["train/dead$", "val/dead_fraction$"]],
        "Loss": ["Multiline", ["train/loss$"]],
    },
    "Run": {
        "Learning rate": ["Multiline", ["train/lr$"]],
        "Gradient norm": ["Multiline", ["train/gradient_norm$"]],
        "Activations per second": ["Multiline", ["speed/activations_per_second$"]],
        "Share of the time": ["Multiline", ["time/.*"]],
    },
}
"""Charts of TensorBoard's page "Custom Scalars": by group, title, kind and patterns of names."""


class RunOverview(Callback):
    """Logs the settings of the run, and gives TensorBoard an overview page of charts.

    Settings are architecture, the SAE's arguments that differ from their defaults and a few more,
    model, hook, text, batch size and steps. TensorBoard's page "HParams" shows them beside the
    latest values of `FIGURES`, so that runs of a sweep can be sorted by result; other loggers get
    them as hyper-parameters. The page "Custom Scalars" shows the charts of `LAYOUT`.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        settings = settings_of_run(trainer, pl_module)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger | NamedValues):  # of one SAE among several
                logger.log_hyperparams(settings)
        for writer in writers(trainer.loggers):
            writer.add_custom_scalars(LAYOUT)
            _add_settings(writer, settings)


def _add_settings(writer: Any, settings: dict[str, Any]) -> None:
    """A row of the page "HParams". Its figures are the latest of the curves of these names."""
    from torch.utils.tensorboard.summary import hparams  # not wanted without TensorBoard, and slow

    names = [f"{stage}/{figure}" for stage in ("val", "test") for figure in FIGURES]
    for part in hparams(settings, dict.fromkeys(names, 0.0)):
        writer.file_writer.add_summary(part)


def settings_of_run(trainer: Trainer, sae: LightningModule) -> dict[str, Any]:
    """Plain values by name; of the SAE's arguments, `ALWAYS` and all that differ from defaults."""
    data = source_of(trainer)
    source = {} if data is None else data.source
    defaults = _defaults(type(sae))
    own = {
        name: value
        for name, value in plain_arguments(sae.hparams).items()
        if name in ALWAYS or value != defaults.get(name, value)
    }
    # TensorBoard sorts by name and shows the first five: those of the SAE come before the run's.
    run = {
        **{name: source.get(name) for name in ("model", "hook_name", "text")},
        "batch_size": None if data is None else vars(data).get("batch_size"),
        "max_steps": trainer.max_steps,
    }
    given = {"architecture": type(sae).__name__, **own}
    given |= {f"run.{name}": value for name, value in run.items()}
    shown = {name: value for name, value in given.items() if name[0] != "_" and value is not None}
    return {name: v if isinstance(v, Real | str) else str(v) for name, v in shown.items()}


def _defaults(kind: type) -> dict[str, Any]:
    """Defaults of the arguments of a class and its bases."""
    inits = [vars(each)["__init__"] for each in reversed(kind.__mro__) if "__init__" in vars(each)]
    parameters = [p for init in inits[1:] for p in inspect.signature(init).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty}
