"""The command line: Lightning's own, with the parts of an SAE's run added."""

import logging
import os
import pkgutil
import shlex
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.bench.trainer import BenchTrainer
from lightning_sae.callbacks import (
    ExportSAE,
    HeldOutEvaluation,
    Histograms,
    LatentFigures,
    LatentWriter,
    RunCheckpoint,
    RunOverview,
    SAEProgressBar,
    SplicedLossMonitor,
    StepMonitor,
    StreamMonitor,
    TopContexts,
)
from lightning_sae.callbacks.results import unused
from lightning_sae.callbacks.run_folder import held, require_new_run, without_empty_curves
from lightning_sae.checkpoints import AtomicCheckpointIO
from lightning_sae.checks import all_at_once, is_noted, of_ours, refuse
from lightning_sae.commands import configs
from lightning_sae.data import ActivationDataModule, CachedDataModule, ToyDataModule
from lightning_sae.distributed.ranks import require_agreement
from lightning_sae.files import remove_unfinished, write_atomically
from lightning_sae.side_by_side import SideBySide
from lightning_sae.side_by_side.results import after_fit, after_predict, after_test, after_validate
from lightning_sae.training.lengths import problems_of_lengths

C = TypeVar("C", bound=Callback)

BESIDE = {
    "analyze": "lightning_sae.analysis.analyze:main",
    "cache": "lightning_sae.data.cache.command:main",
    "compare": "lightning_sae.analysis.compare:main",
    "configs": "lightning_sae.commands.configs:main",
    "evaluate": "lightning_sae.analysis.evaluation.command:main",
    "export": "lightning_sae.commands.import_export:export_main",
    "import": "lightning_sae.commands.import_export:import_main",
    "push": "lightning_sae.commands.push:main",
    "steer": "lightning_sae.analysis.steering:main",
}
"""Commands without a run. Imported only when used: `fit` needs no scikit-learn."""

STREAMS = ActivationDataModule, CachedDataModule, ToyDataModule
"""Data that has no end."""

VALIDATE_EVERY = 1000
"""Batches between two validations of a stream, where the configuration does not say."""


class SaveConfig(SaveConfigCallback):
    """Writes the run's whole configuration to `<trainer.default_root_dir>/config.yaml`.

    With several ranks: refuses to start if their configurations differ.

    Attributes:
        path: The file, set when it is written.
    """

    path: Path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the ranks. `on_fit_start` writes the file, because only it knows of a resume."""
        if trainer.world_size > 1:
            text = self.parser.dump(self.config, skip_none=False)
            require_agreement(trainer, yaml.safe_load(text))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        self.path = folder / "config.yaml"
        if not trainer.is_global_zero:
            return
        remove_unfinished(folder, "config*.yaml")
        text = self.parser.dump(self.config, skip_none=False)
        # A run stopped before its first checkpoint may have left the same file.
        if not self.path.exists() or self.path.read_text() != text:
            self.path = unused(self.path)  # a resumed run may have other settings
            write_atomically(self.path, lambda path: path.write_text(text))


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
        root = Path(self.trainer.default_root_dir)
        last, config = root / "checkpoints" / "last.ckpt", self._config_in_force()
        if isinstance(self.model, SideBySide):
            say(*after_fit(self.model, self.trainer, config))
            return
        made = {
            self._callback(ExportSAE).folder: "the SAE, for lightning_sae.load",
            last: "to resume from",
            root / "tensorboard": "curves and histograms",
        }
        say(
            f"\nTrained {type(self.model).__name__} for {self.trainer.global_step} steps. Made:",
            *(f"  {path}  {what}" for path, what in made.items() if path and path.exists()),
            "Next:",
            "  " + quoted("lightning-sae", "test", "--config", config, "--ckpt_path", last),
            *self._how_to_watch(),
        )

    def _how_to_watch(self) -> list[str]:
        """The command that shows the curves, where there is a TensorBoard."""
        loggers = [log for log in self.trainer.loggers if isinstance(log, TensorBoardLogger)]
        return ["  " + quoted("tensorboard", "--logdir", Path(log.log_dir)) for log in loggers]

    def _config_in_force(self) -> Path:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return Path(self.trainer.default_root_dir) / "config.yaml"
        return self._callback(SaveConfig).path

    def after_test(self) -> None:
        """Print the metrics and their path."""
        if isinstance(self.model, SideBySide):
            say(*after_test(self.model, self.trainer))
            return
        evaluation = self._callback(HeldOutEvaluation)
        root = Path(self.trainer.default_root_dir)
        show = f"import lightning_sae; print(lightning_sae.load({_newest(root)!r}))"
        say(
            "\nOn held-out text:",
            *(f"  {name:<30}{value:>14.6g}" for name, value in evaluation.results.items()),
            f"Made: {evaluation.path}",
            "Next:",
            *self._how_to_watch(),
            "  " + quoted("python", "-c", show),
        )

    def after_validate(self) -> None:
        """Print that nothing was written."""
        if isinstance(self.model, SideBySide):
            say(*after_validate(self.model))
            return
        say("\nValidated on held-out text. Made nothing: `lightning-sae test` writes results.json.")

    def predict(self, **arguments: Any) -> None:
        """Predict without holding all latents in memory: they are written batch by batch."""
        self.trainer.predict(**{**arguments, "return_predictions": False})

    def after_predict(self) -> None:
        """Print where the latents are."""
        if isinstance(self.model, SideBySide):
            say(*after_predict(self.model))
            return
        folder = self._callback(LatentWriter).folder
        say(
            "\nPredicted the latents of held-out text.",
            f"Made: {folder}  safetensors, the non-zero latents of a batch in compressed rows",
        )

    def after_bench(self) -> None:
        """Print the metrics and their path."""
        report = cast(BenchTrainer, self.trainer).bench_report
        say("", *report.lines(), "", f"Made: {report.path}")

    def _callback(self, kind: type[C]) -> C:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, kind))


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


def _newest(root: Path) -> str:
    exported = sorted(root.glob("sae*/config.json"), key=lambda path: path.stat().st_mtime)
    return str(exported[-1].parent if exported else root / "sae")


def quoted(*words: str | Path) -> str:
    """Words of a command, quoted for a shell."""
    return shlex.join(map(str, words))


@rank_zero_only
def say(*lines: str) -> None:
    """Print lines to the terminal, on rank 0 only."""
    sys.stdout.write("\n".join(lines) + "\n")


def command() -> None:
    """Run `lightning-sae`; bad input ends in a one-line message instead of a traceback.

    The environment variable `LIGHTNING_SAE_TRACEBACK=1` shows the traceback.
    """
    _leave_out_of_others()
    try:
        sys.argv[1:] = configs.with_files(sys.argv[1:])  # other ranks are started with these
        if sys.argv[1:2] == ["study"]:
            _study(sys.argv[2:])
        elif sys.argv[1:2] and sys.argv[1] in BESIDE:
            pkgutil.resolve_name(BESIDE[sys.argv[1]])(sys.argv[2:])
        else:
            main()
    except (ValueError, OSError, FloatingPointError, MisconfigurationException) as error:
        own = of_ours(error)
        end_with(f"{type(own).__name__}: {own}")
    except RecursionError as error:  # of a file that contains itself
        end_with(f"The arguments are nested too deeply: {error}.")
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        end_with(f"Another rank ended or cannot be reached; its own message says why. ({error})")


def _leave_out_of_others() -> None:
    """Silence Lightning's advertisements, and deprecations that users cannot act on."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: not record.getMessage().startswith("💡 Tip"))


def end_with(message: str) -> NoReturn:
    """Exit with one line, or with the traceback if requested."""
    if os.environ.get("LIGHTNING_SAE_TRACEBACK"):
        raise
    sys.exit(f"lightning-sae: {message}\n(LIGHTNING_SAE_TRACEBACK=1 shows where)")


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error means that another rank is gone."""
    if not distributed.is_available():
        return False
    of_torch = isinstance(error, distributed.DistError)  # also before the ranks have met
    return of_torch or (distributed.is_initialized() and "gloo" in str(error))


def _study(args: list[str]) -> None:
    """Run a study, which builds its own models and data, without Lightning's parser."""
    from lightning_sae import studies  # needs matplotlib, which is slow to import

    studies.main(args)


def main(args: ArgsType = None, run: bool = True) -> SAECLI:
    """Run `lightning-sae`.

    Args:
        args: Command-line arguments; those of the process by default.
        run: Whether to run the command, or only build its parts.

    Returns:
        The command line object with its model, data and trainer.
    """
    return SAECLI(
        LightningModule,  # see `add_core_arguments_to_parser`
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        trainer_class=BenchTrainer,
        seed_everything_default=0,
        trainer_defaults={
            "callbacks": [
                ExportSAE(),
                Histograms(),
                LatentFigures(),
                LatentWriter(),
                RunOverview(),
                StepMonitor(),
                StreamMonitor(),
                TopContexts(),
            ]
        },
        auto_configure_optimizers=False,
        parser_kwargs={
            "description": "Train, measure and study sparse autoencoders. Beside the subcommands "
            "below there are `cache`, activations written to the disk; `analyze SAE`, what each "
            "latent fires on; `evaluate SAE`, whether latents are features; `compare SAE SAE`, how "
            "many latents they share; `steer SAE`, what editing a latent changes; `import X` and "
            "`export SAE`, other libraries' SAEs in and ours out; `push RUN NAME`, SAEs onto the "
            "Hugging Face hub; `study NAME`, the source documents' experiments; and `configs`, "
            "those that come with the package."
        },
        args=configs.with_files(args) if isinstance(args, list) else args,
        run=run,
    )
