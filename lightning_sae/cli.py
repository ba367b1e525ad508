"""The command line: Lightning's own, with the parts of a run on an SAE put together."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
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

from lightning_sae import configurations
from lightning_sae.analysis import analyze, compare, steering
from lightning_sae.bench.trainer import BenchTrainer
from lightning_sae.callbacks import (
    ExportSAE,
    HeldOutEvaluation,
    Histograms,
    LatentWriter,
    RunCheckpoint,
    SAEProgressBar,
    StreamMonitor,
)
from lightning_sae.callbacks.checkpoint import require_new_run
from lightning_sae.callbacks.results import unused
from lightning_sae.distributed import require_agreement
from lightning_sae.files import AtomicCheckpointIO
from lightning_sae.side_by_side import SideBySide
from lightning_sae.side_by_side.results import after_fit, after_predict, after_test, after_validate

C = TypeVar("C", bound=Callback)

BESIDE: dict[str, Callable[[list[str]], None]] = {
    "analyze": analyze.main,
    "compare": compare.main,
    "configs": configurations.main,
    "steer": steering.main,
}
"""Commands that need no run."""


class SaveConfig(SaveConfigCallback):
    """Writes the run's whole configuration to `<trainer.default_root_dir>/config.yaml`.

    With several ranks: refuses to start if they have different ones.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: whether the run is resumed is known only when it starts."""
        if trainer.world_size > 1:
            text = self.parser.dump(self.config, skip_none=False)
            require_agreement(trainer, yaml.safe_load(text))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = unused(folder / "config.yaml")  # a resumed run may have other settings
        self.parser.save(self.config, path, skip_none=False, multifile=False)


class SAECLI(LightningCLI):
    """Lightning's command line with an SAE as model and a stream of activations as data.

    The SAE's `d_in` is read from the data. Every run gets a progress bar, TensorBoard logs,
    checkpoints, the exported SAE and, by `test`, an evaluation in the language model, by `predict`
    the latents, all below `trainer.default_root_dir`.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.d_in", "model.init_args.d_in", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SAEProgressBar, "progress_bar")
        parser.add_lightning_class_args(HeldOutEvaluation, "evaluation")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/sae",
                "data": {"class_path": "lightning_sae.ActivationDataModule"},
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Take no arguments, and so no classes, from a checkpoint: the configuration says all."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        root = self._get(self.config_init, "trainer.default_root_dir")
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(root, name="tensorboard", version="")
        if not self._get(self.config_init, "trainer.plugins"):
            kwargs["plugins"] = [AtomicCheckpointIO()]
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            self._parser(self.subcommand).callback_keys.remove("progress_bar")
        if self._get(self.config_init, "trainer.enable_checkpointing") is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        if isinstance(self.model, SideBySide):
            self._give_each(self.model)
        return super().instantiate_trainer(**kwargs)

    def _give_each(self, model: SideBySide) -> None:
        """Give the parts of a run on one SAE to each member instead of to the run."""
        self._parser(self.subcommand).callback_keys.remove("evaluation")
        self.trainer_defaults = {"callbacks": [StreamMonitor()]}
        n_tokens = self._get(self.config_init, "evaluation").n_tokens
        model.give_each(
            lambda: [ExportSAE(), Histograms(), LatentWriter(), HeldOutEvaluation(n_tokens)]
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and `bench`."""
        return {**LightningCLI.subcommands(), "bench": {"model", "datamodule"}}

    def before_fit(self) -> None:
        """Refuse a folder that holds a run, before anything is written."""
        root, ckpt_path = Path(self.trainer.default_root_dir), self._ckpt_path()
        if ckpt_path is not None:
            require_checkpoint(ckpt_path, root)
        require_new_run(root, ckpt_path, ("config.yaml", "checkpoints", "sae", "members"))

    def before_test(self) -> None:
        """Refuse to evaluate an SAE that was not trained."""
        require_checkpoint(self._ckpt_path(), Path(self.trainer.default_root_dir))

    before_validate = before_predict = before_test

    def _ckpt_path(self) -> str | None:
        return self._get(self.config_init, "ckpt_path")

    def after_fit(self) -> None:
        """Say what was made and what to type next."""
        root = Path(self.trainer.default_root_dir)
        if isinstance(self.model, SideBySide):
            say(*after_fit(self.model, self.trainer))
            return
        made = {
            self._callback(ExportSAE).folder: "the SAE, for lightning_sae.load",
            root / "checkpoints" / "last.ckpt": "to go on from",
            root / "tensorboard": "curves and histograms",
        }
        say(
            f"\nTrained {type(self.model).__name__} for {self.trainer.global_step} steps. Made:",
            *(f"  {path}  {what}" for path, what in made.items() if path and path.exists()),
            "Next:",
            f"  lightning-sae test --config {root / 'config.yaml'} "
            f"--ckpt_path {root / 'checkpoints' / 'last.ckpt'}",
            f"  tensorboard --logdir {root / 'tensorboard'}",
        )

    def after_test(self) -> None:
        """Show the figures and where they are."""
        if isinstance(self.model, SideBySide):
            say(*after_test(self.model, self.trainer))
            return
        evaluation = self._callback(HeldOutEvaluation)
        root = Path(self.trainer.default_root_dir)
        say(
            "\nOn held-out text:",
            *(f"  {name:<30}{value:>14.6g}" for name, value in evaluation.results.items()),
            f"Made: {evaluation.path}",
            "Next:",
            f"  tensorboard --logdir {root / 'tensorboard'}",
            f'  python -c "import lightning_sae; print(lightning_sae.load({_newest(root)!r}))"',
        )

    def after_validate(self) -> None:
        """Say that there is no more than what was shown."""
        if isinstance(self.model, SideBySide):
            say(*after_validate(self.model))
            return
        say("\nValidated on held-out text. Made nothing: `lightning-sae test` writes results.json.")

    def predict(self, **arguments: Any) -> None:
        """Predict without holding all latents in memory: they are written batch by batch."""
        self.trainer.predict(**{**arguments, "return_predictions": False})

    def after_predict(self) -> None:
        """Say where the latents are."""
        if isinstance(self.model, SideBySide):
            say(*after_predict(self.model))
            return
        folder = self._callback(LatentWriter).folder
        say(
            "\nPredicted the latents of held-out text.",
            f"Made: {folder}  safetensors, the non-zero latents of a batch in compressed rows",
        )

    def after_bench(self) -> None:
        """Show the figures and where they are."""
        report = cast(BenchTrainer, self.trainer).bench_report
        say("", *report.lines(), "", f"Made: {report.path}")

    def _callback(self, kind: type[C]) -> C:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, kind))


def require_checkpoint(ckpt_path: str | None, root: Path) -> None:
    """Raise a ValueError if `ckpt_path` is no checkpoint file; without one, weights are random."""
    if ckpt_path is None or ("://" not in ckpt_path and not Path(ckpt_path).is_file()):
        raise ValueError(
            f"Expected argument `ckpt_path` to be a checkpoint file but got {ckpt_path}: a run "
            f"leaves its own at {root / 'checkpoints' / 'last.ckpt'}"
        )


def _newest(root: Path) -> str:
    exported = sorted(root.glob("sae*/config.json"), key=lambda path: path.stat().st_mtime)
    return str(exported[-1].parent if exported else root / "sae")


@rank_zero_only
def say(*lines: str) -> None:
    """Print lines for the reader at the terminal, once for all ranks."""
    sys.stdout.write("\n".join(lines) + "\n")


def command() -> None:
    """Run `lightning-sae`, and end with one line, not a traceback, where the input is bad.

    The environment variable `LIGHTNING_SAE_TRACEBACK=1` shows the traceback all the same.
    """
    _leave_out_of_others()
    try:
        sys.argv[1:] = configurations.with_files(sys.argv[1:])  # ranks are started with these
        if sys.argv[1:2] == ["study"]:
            _study(sys.argv[2:])
        elif sys.argv[1:2] and sys.argv[1] in BESIDE:
            BESIDE[sys.argv[1]](sys.argv[2:])
        else:
            main()
    except (ValueError, OSError, FloatingPointError, MisconfigurationException) as error:
        own = of_ours(error)
        end_with(f"{type(own).__name__}: {own}")
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        end_with(f"Another rank ended or cannot be reached; its own message says why. ({error})")


def _leave_out_of_others() -> None:
    """Keep Lightning's advertisements and deprecations that no user can act on off the terminal."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: not record.getMessage().startswith("💡 Tip"))


def of_ours(error: Exception) -> Exception:
    """The error itself, where jsonargparse has wrapped it into one that shows all arguments."""
    while isinstance(error.__cause__, ValueError) and "Given value" in str(error):
        error = error.__cause__
    return error


def end_with(message: str) -> NoReturn:
    """End with a line, or with the exception in progress if that is asked for."""
    if os.environ.get("LIGHTNING_SAE_TRACEBACK"):
        raise
    sys.exit(f"lightning-sae: {message}\n(LIGHTNING_SAE_TRACEBACK=1 shows where)")


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error is what a process with several ranks gets when another one is gone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _study(args: list[str]) -> None:
    """A study builds its own models and data, so Lightning's parser has no part in it."""
    from lightning_sae import studies  # for its pictures it needs matplotlib, which is slow to load

    studies.main(args)


def main(args: ArgsType = None, run: bool = True) -> SAECLI:
    """Run `lightning-sae`.

    Args:
        args: Command-line arguments; those of the process by default.
        run: Whether to run the command, rather than only build its parts.

    Returns:
        The command line with its model, data and trainer.
    """
    return SAECLI(
        LightningModule,  # an SAE, or several side by side
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        trainer_class=BenchTrainer,
        seed_everything_default=0,
        trainer_defaults={
            "callbacks": [ExportSAE(), Histograms(), LatentWriter(), StreamMonitor()]
        },
        auto_configure_optimizers=False,
        parser_kwargs={
            "description": "Train, measure and study sparse autoencoders. Beside the subcommands "
            "below there are `analyze SAE`, what each latent fires on; `compare SAE SAE`, how many "
            "latents they share; `steer SAE`, what editing a latent changes; `study NAME`, the "
            "source documents' experiments; and `configs`, those that come with the package."
        },
        args=configurations.with_files(args) if isinstance(args, list) else args,
        run=run,
    )
