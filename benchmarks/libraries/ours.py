"""lightning-sae, trained by Lightning's Trainer."""

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from benchmarks.libraries.base import Contender, Task
from benchmarks.measure import Watch
from lightning_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE
from lightning_sae.callbacks import DecoderNormProjection

CLASSES: dict[str, Any] = {
    "relu": ReLUSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Trainer arguments with which nothing is logged or saved, as with the other libraries."""


class Trained(Contender):
    """An SAE under `Trainer(callbacks=DecoderNormProjection())`.

    The variant `dense` keeps latents as a matrix for the whole run.
    """

    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        cls = CLASSES[task.architecture]
        self.task = task
        self.sae = cls(task.d_in, task.d_sae, lr=task.lr, **_settings(task)).to(task.device)
        if task.variant == "dense":
            self.sae.layout.thresholds = (0.0, 1.0)

    @override
    def train(self, watch: Watch) -> None:
        where = {"accelerator": self.task.device, "precision": self.task.precision, "devices": 1}
        trainer = Trainer(max_epochs=1, callbacks=[DecoderNormProjection()], **QUIET | where)
        trainer.fit(self.sae, watch)
        self.logged = trainer.callback_metrics

    @property
    @override
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.sae.W_enc

    @property
    @override
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.sae.W_dec

    @override
    def set_threshold(self, threshold: float) -> None:
        if hasattr(self.sae, "threshold"):
            self.sae.threshold.fill_(threshold)
            self.sae.threshold_init = threshold  # or the first batch would set others
        else:
            self.sae.b_enc.fill_(-threshold)

    @override
    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        return float(self.logged["train/l0"])

    @override
    def latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return self.sae.encode(x)

    @override
    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        return self.sae.decode(f)

    @override
    def note(self) -> str:
        return "dense" if self.sae.layout.dense else "sparse"


def _settings(task: Task) -> dict[str, Any]:
    match task.architecture:
        case "relu" | "gated":
            return {"l1_coefficient": task.l1_coefficient}
        case "topk" | "batchtopk":
            return {"k": task.k}
        case "jumprelu":
            return {"bandwidth": 0.05}  # the default is one deviation of the first batch
    return {}
