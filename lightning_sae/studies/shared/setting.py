"""Settings common to studies of language models: model, text, length of training, folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_sae.checks import require_positive
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import Dtype
from lightning_sae.studies.shared.folder import open_folder


class Setting:
    """A language model, its text, and how long SAEs are trained on it.

    Activations are scaled to mean norm sqrt(d_in), so that coefficients mean the same for every
    model, and centred.

    Args:
        model: Folder or hub name of the language model, or `embedded`.
        hook_name: TransformerLens name of the hook, or a list of them.
        text: `embedded`, files, folders or a hub name; see `ActivationDataModule`.
        validation_text: Separate text for evaluation; by default a share of the documents.
        text_column: Name of the text column, if the text has columns.
        streaming: Read a hub data set as a stream, without a copy on the disk.
        model_dtype: dtype of the language model's weights.
        context_length: Tokens in a block.
        d_sae: Latents of each SAE.
        steps: Optimizer steps of each SAE.
        batch_size: Activations in a step.
        buffer_size: Activations in the shuffling buffer.
        lr: Learning rate.
        held_out_tokens: Held-out tokens that every SAE is evaluated on.
        seeds: Repetitions, with seeds from 0 on, of the initial weights and the order of the text.
        center: Whether the mean activation is subtracted from all activations.
        device: `auto`, `cpu` or `cuda`.
        output: A new or empty folder, or that of this study with the same settings, which then
            resumes.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        output: str | Path,
        hook_name: str | Sequence[str] = "blocks.1.hook_resid_post",
        model: str = "embedded",
        *,
        text: str | Sequence[str] = "embedded",
        validation_text: str | Sequence[str] | None = None,
        text_column: str = "text",
        streaming: bool = False,
        model_dtype: Dtype = "float32",
        context_length: int = 128,
        d_sae: int = 1024,
        steps: int = 1000,
        batch_size: int = 2048,
        buffer_size: int = 65536,
        lr: float = 1e-3,
        held_out_tokens: int = 65536,
        seeds: int = 2,
        center: bool = True,
        device: str = "auto",
    ) -> None:
        require_positive(d_sae=d_sae, steps=steps, lr=lr, seeds=seeds)
        require_positive(held_out_tokens=held_out_tokens, context_length=context_length)
        self.model, self.text, self.validation_text = model, text, validation_text
        self.text_column, self.streaming = text_column, streaming
        self.model_dtype: Dtype = model_dtype
        self.hook_names = [hook_name] if isinstance(hook_name, str) else list(hook_name)
        self.context_length = context_length
        self.batch_size, self.buffer_size = batch_size, buffer_size
        self.d_sae, self.steps, self.lr = d_sae, steps, lr
        self.held_out_tokens, self.seeds, self.device = held_out_tokens, seeds, device
        self.center = center
        self.folder = Path(output)

    def plain(self) -> dict[str, Any]:
        """All but the folder and the device, as plain values."""
        own = {name: value for name, value in vars(self).items() if name not in MAY_CHANGE}
        return dict(json.loads(json.dumps(own, default=str)))

    def open(self, **settings: Any) -> Path:
        """Make or reopen the study's folder; see `open_folder`.

        Args:
            settings: Settings that a study adds to the common ones.
        """
        _ = self.data().d_in  # raises if sizes do not fit or the model has no such hook
        return open_folder(self.folder, {**self.plain(), **settings})

    def data(self, seed: int = 0, hook_names: Sequence[str] | None = None) -> ActivationDataModule:
        """The stream of activations at all hooks or at those named."""
        names = list(hook_names or self.hook_names)
        data = ActivationDataModule(
            names[0] if len(names) == 1 else names,
            self.model,
            text=self.text,
            validation_text=self.validation_text,
            text_column=self.text_column,
            streaming=self.streaming,
            model_dtype=self.model_dtype,
            context_length=self.context_length,
            batch_size=self.batch_size,
            buffer_size=self.buffer_size,
            center=self.center,
            scale=True,
            seed=seed,
        )
        if self.device != "cpu" and torch.cuda.is_available():
            data.language_model.to("cuda")  # some figures are measured without a trainer
        return data

    def held_out(self, hook_names: Sequence[str] | None = None) -> ActivationDataModule:
        """The data for evaluation: the same for all seeds, so that only the SAEs differ."""
        return self.data(0, hook_names)

    def share(self, part: float) -> int:
        """A share of the run in steps."""
        return int(part * self.steps)

    def arguments(self, **own: Any) -> dict[str, Any]:
        """Arguments of an SAE: the shared ones and its own."""
        common = {
            "d_sae": self.d_sae,
            "lr": self.lr,
            "lr_warmup_steps": self.share(0.05),
            "lr_decay_steps": self.share(0.25),
            "dead_after": max(1, self.share(0.2) * self.batch_size),
        }
        return {**common, **own}


MAY_CHANGE = ("folder", "device", "seeds")
"""Settings that may differ when a study resumes."""
