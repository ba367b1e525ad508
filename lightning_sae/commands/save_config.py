"""The configuration of a run, written to its folder."""

from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from lightning_sae.callbacks.results import unused
from lightning_sae.distributed.ranks import require_agreement
from lightning_sae.files import remove_unfinished, write_atomically


class SaveConfig(SaveConfigCallback):
    """Writes the run's whole configuration to `<trainer.default_root_dir>/config.yaml`.

    With several ranks: refuses to start if their configurations differ.

    Attributes:
        path: The file, set when it is written.
    """

    path: Path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all ranks have the same configuration.

        It is written in `on_fit_start`, when it is known whether the run resumes.
        """
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
