"""The commands with a run: `fit`, `validate`, `test`, `predict` and `bench`."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.bench.trainer import BenchTrainer
from lightning_sae.callbacks import (
    ExportSAE,
    HeldOutEvaluation,
    Histograms,
    LatentWriter,
    RunCheckpoint,
    RunOverview,
    SAEProgressBar,
    SplicedLossMonitor,
    StepMonitor,
    StreamMonitor,
)
from lightning_sae.callbacks.run_folder import held, require_new_run, without_empty_curves
from lightning_sae.checkpoints import AtomicCheckpointIO
from lightning_sae.checks import all_at_once, is_noted, of_ours, refuse
from lightning_sae.commands import results
from lightning_sae.commands.results import say
from lightning_sae.commands.save_config import SaveConfig
from lightning_sae.data import ActivationDataModule, CachedDataModule, ToyDataModule
from lightning_sae.side_by_side import SideBySide
from lightning_sae.side_by_side import results as of_members
from lightning_sae.training.lengths import problems_of_lengths

STREAMS = ActivationDataModule, CachedDataModule, ToyDataModule
"""Data that has no end."""

VALIDATE_EVERY = 1000
"""Batches between two validations of a stream, where the configuration does not say."""


class SAECLI(LightningCLI):
    """Lightning's command line with an SAE as model and a stream of activations as data.

    The SAE's `d_in` is read from the data. Every run writes TensorBoard logs, checkpoints and the
    exported SAE below `trainer.default_root_dir`; `test` adds an evaluation in the language model,
    `predict` the latents. Every run shows a progress bar.
    """

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        *,
        args: ArgsType = None,
        **settings: Any,
    ) -> None:
        words = sys.argv[1:] if args is None else args
        self._first_word = words[0] if isinstance(words, list) and words else None
        super().__init__(model_class, datamodule_class, args=args, **settings)

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Like Lightning's, but without arguments if the first word is another subcommand.

        Lightning gives each of the subcommands all of its arguments, which takes 0.1 s in all.
        """
        if self._first_word != subcommand and self._first_word in self.subcommands():
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Like Lightning's, but `--model` must be an SAE or several side by side."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        kinds = (SparseAutoencoder, SideBySide)
        parser.add_subclass_arguments(kinds, "model", fail_untyped=False, required=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        groups = cast(dict[str, Any], parser.groups)
        groups["model"].title = "The SAE, or several side by side"
        groups["data"].title = "The activations"

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments(
            "data.d_in", "model.init_args.d_in", compute_fn=self._width, apply_on="instantiate"
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SAEProgressBar, "progress_bar")
        parser.add_lightning_class_args(HeldOutEvaluation, "evaluation")
        parser.add_lightning_class_args(SplicedLossMonitor, "spliced_loss")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/sae",
                "data": {"class_path": "lightning_sae.ActivationDataModule"},
            }
        )

    def _width(self, d_in: Any) -> Any:
        """The width of the data's activations, of one hook where the model is one SAE."""
        kind = str(self._get(self.config, "model").class_path)
        if isinstance(d_in, dict) and not kind.endswith("SideBySide"):
            refuse(
                f"Expected argument `hook_name` to be one hook, for {kind.rpartition('.')[2]} is a "
                f"single SAE, but got {', '.join(d_in)}: choose one by `--data.hook_name`, or "
                "train an SAE at each with `SideBySide`."
            )
            return next(iter(d_in.values()))
        return d_in

    @override
    def _parse_ckpt_path(self) -> None:
        """Take no arguments or classes from a checkpoint: the configuration has them all.

        When the checkpoint is loaded, its settings are compared with the configuration's.
        """

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Like Lightning's, but use the new folder if the run's folder was moved."""
        super().parse_arguments(parser, args)
        given = sys.argv[1:] if args is None else args
        in_words = isinstance(given, list) and any("default_root_dir" in word for word in given)
        own = self.config.get(str(self.config.get("subcommand")))
        if own is not None and own.get("config") and own.get("ckpt_path") and not in_words:
            folder = Path(str(own.config[-1])).parent
            trainer = own.trainer
            if _is_moved(folder, Path(own.ckpt_path), Path(trainer.default_root_dir)):
                say(f"The run's folder is {folder}, not {trainer.default_root_dir} as it was.")
                trainer.default_root_dir = str(folder)

    @override
    def instantiate_classes(self) -> None:
        """Like Lightning's, but names all bad arguments at once."""
        with all_at_once():
            try:
                super().instantiate_classes()
            except ValueError as error:
                refuse(str(of_ours(error)))
                self._look_at_each_part()
            else:
                self._look_further()

    def _look_at_each_part(self) -> None:
        """Collect errors in arguments of the data and of a single SAE, where `d_in` is unknown."""
        data, model = self._get(self.config, "data"), self._get(self.config, "model")
        _look_at_text(_instance(LightningDataModule, data))
        if not model.class_path.endswith("SideBySide"):
            # Sizes that the data would give: small, and with room for any `k` and `prefixes`.
            model.init_args.d_in = 2
            if model.init_args.get("d_sae") is None:
                model.init_args.d_sae = 2**20
            _instance(SparseAutoencoder, model)

    def _look_further(self) -> None:
        """Collect errors in lengths and text too, if there are errors in other arguments."""
        if is_noted() and self.subcommand == "fit":
            for problem in problems_of_lengths(self.trainer, self.model):
                refuse(problem)
            _look_at_text(self.datamodule)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        root = self._get(self.config_init, "trainer.default_root_dir")
        if self._get(self.config_init, "trainer.logger") in (None, True):
            # Without Lightning's placeholder metric: `RunOverview` logs the hyper-parameters with
            # metrics.
            kwargs["logger"] = TensorBoardLogger(
                root, name="tensorboard", version="", default_hp_metric=False
            )
        if not self._get(self.config_init, "trainer.plugins"):
            kwargs["plugins"] = [AtomicCheckpointIO()]
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            self._parser(self.subcommand).callback_keys.remove("progress_bar")
        if self._get(self.config_init, "trainer.enable_checkpointing") is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        if isinstance(self.model, SideBySide):
            self._give_each(self.model)
        if self.subcommand == "fit":
            kwargs |= self._validation()
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            kind = str(error).split("`")[1]
            raise ValueError(
                f"Expected argument `trainer.callbacks` to have one `{kind}` but got more, or one "
                "beside that of the command itself: remove it."
            ) from error

    def _validation(self) -> dict[str, Any]:
        """How often to validate in a stream without epochs, where the configuration has no answer.

        Lightning would wait for the end of an epoch. A run that is shorter validates at its end.
        """
        given = self._get(self.config_init, "trainer")
        by_epochs = given.limit_train_batches or given.overfit_batches or given.fast_dev_run
        is_given = given.val_check_interval is not None or given.check_val_every_n_epoch != 1
        if by_epochs or is_given or not isinstance(self.datamodule, STREAMS):
            return {}
        run = given.max_steps * given.accumulate_grad_batches
        interval = min(VALIDATE_EVERY, run) if run > 0 else VALIDATE_EVERY
        return {"val_check_interval": interval, "check_val_every_n_epoch": None}

    def _give_each(self, model: SideBySide) -> None:
        """Give the callbacks for a single SAE to each member instead of to the run."""
        for key in ("evaluation", "spliced_loss"):
            self._parser(self.subcommand).callback_keys.remove(key)
        self.trainer_defaults = {"callbacks": [StreamMonitor()]}
        evaluation = self._get(self.config_init, "evaluation")
        spliced_loss = self._get(self.config_init, "spliced_loss")
        known: dict[str, dict[str, float]] = {}

        def parts() -> list[Callback]:
            monitor = SplicedLossMonitor(spliced_loss.n_tokens)
            monitor.known = known  # so that ablations are run once for all members
            watching = [Histograms(), RunOverview(), StepMonitor(), monitor]
            return [ExportSAE(), LatentWriter(), HeldOutEvaluation(evaluation.n_tokens), *watching]

        model.give_each(parts)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and `bench`."""
        return {**LightningCLI.subcommands(), "bench": {"model", "datamodule"}}

    def fit(self, **arguments: Any) -> None:
        """Train, unless the folder holds another run or one that is still running."""
        root, ckpt_path = Path(self.trainer.default_root_dir), self._ckpt_path()
        with held(root) if self.trainer.is_global_zero else nullcontext():
            if ckpt_path is not None:
                require_checkpoint(ckpt_path, root)
            require_new_run(root, ckpt_path)
            with without_empty_curves(root, self._has_begun):
                self.trainer.fit(**arguments)

    def _has_begun(self) -> bool:
        """Whether the run got past the checks, after which it saves its configuration."""
        saving = [c for c in self.trainer.callbacks if isinstance(c, SaveConfig)]  # type: ignore[attr-defined]
        return not saving or hasattr(saving[0], "path")

    def before_test(self) -> None:
        """Refuse to evaluate an SAE that was not trained."""
        require_checkpoint(self._ckpt_path(), Path(self.trainer.default_root_dir))

    before_validate = before_predict = before_test

    def _ckpt_path(self) -> str | None:
        return self._get(self.config_init, "ckpt_path")

    def after_fit(self) -> None:
        """Print what was written and the next commands."""
        config = self._config_in_force()
        if isinstance(self.model, SideBySide):
            say(*of_members.after_fit(self.model, self.trainer, config))
        else:
            say(*results.after_fit(self.model, self.trainer, config))

    def _config_in_force(self) -> Path:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return Path(self.trainer.default_root_dir) / "config.yaml"
        return results.callback_of(self.trainer, SaveConfig).path

    def after_test(self) -> None:
        """Print the metrics of the test and the path of the file that has them."""
        if isinstance(self.model, SideBySide):
            say(*of_members.after_test(self.model, self.trainer))
        else:
            say(*results.after_test(self.trainer))

    def after_validate(self) -> None:
        """Print that nothing was written."""
        if isinstance(self.model, SideBySide):
            say(*of_members.after_validate(self.model))
        else:
            say(*results.after_validate())

    def predict(self, **arguments: Any) -> None:
        """Predict without holding all latents in memory: they are written batch by batch."""
        self.trainer.predict(**{**arguments, "return_predictions": False})

    def after_predict(self) -> None:
        """Print where the latents are."""
        if isinstance(self.model, SideBySide):
            say(*of_members.after_predict(self.model))
        else:
            say(*results.after_predict(self.trainer))

    def after_bench(self) -> None:
        """Print the metrics and their path."""
        report = cast(BenchTrainer, self.trainer).bench_report
        say("", *report.lines(), "", f"Made: {report.path}")


def require_checkpoint(ckpt_path: str | None, root: Path) -> None:
    """Raise a ValueError if `ckpt_path` is not a checkpoint file; weights would be random."""
    if ckpt_path is None or ("://" not in ckpt_path and not Path(ckpt_path).is_file()):
        last = root / "checkpoints" / "last.ckpt"
        remedy = f"the run in {root} left {last}"
        if not last.is_file():
            remedy = f"there is none in {root} either; `fit` without `--ckpt_path` starts a new run"
        raise ValueError(
            f"Expected argument `ckpt_path` to be a checkpoint file but got {ckpt_path}: {remedy}."
        )


def _is_moved(folder: Path, ckpt_path: Path, noted: Path) -> bool:
    """Whether a run's configuration and checkpoint were moved from where the run wrote them."""
    together = ckpt_path.parent.resolve() == (folder / "checkpoints").resolve()
    return together and folder.resolve() != noted.resolve()


def _look_at_text(data: Any) -> None:
    """Collect the error if the text of the data cannot be opened."""
    if isinstance(data, ActivationDataModule):
        try:
            _ = data.corpus
        except ValueError as error:
            refuse(str(error))


def _instance(kind: type, given: Namespace) -> Any:
    """Instantiate a subclass of `kind` from its class path and arguments."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(kind, "part")
    return parser.instantiate_classes(Namespace(part=given)).part
