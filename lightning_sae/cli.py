"""The command line: `lightning-sae`, which finds its commands and words their errors."""

import logging
import os
import pkgutil
import sys
import warnings
from typing import NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed

from lightning_sae.bench.trainer import BenchTrainer
from lightning_sae.callbacks import (
    ExportSAE,
    Histograms,
    LatentFigures,
    LatentWriter,
    RunOverview,
    StepMonitor,
    StreamMonitor,
    TopContexts,
)
from lightning_sae.checks import of_ours
from lightning_sae.commands import configs
from lightning_sae.commands.run import SAECLI
from lightning_sae.commands.save_config import SaveConfig

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
