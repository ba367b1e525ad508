"""dictionary_learning, trained by `trainer.update(step, batch)`, as its `trainSAE` does."""

from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from benchmarks.libraries.base import Contender, Task
from benchmarks.measure import Watch

TRAINERS = {
    "relu": StandardTrainer,
    "gated": GatedSAETrainer,
    "jumprelu": JumpReluTrainer,
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
}


class Trained(Contender):
    """A trainer with the library's defaults except warm-ups; decoder columns have norm 1."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        self.task = task
        self.trainer: Any = TRAINERS[task.architecture](
            steps=task.n_steps + 1,
            activation_dim=task.d_in,
            dict_size=task.d_sae,
            layer=0,
            lm_name="",
            lr=task.lr,
            warmup_steps=0,
            device=task.device,
            **_settings(task),
        )
        self.ae = self.trainer.ae

    @override
    def train(self, watch: Watch) -> None:
        lower = self.task.precision == "bf16-mixed"
        for step, batch in enumerate(watch):
            with torch.autocast(self.task.device, torch.bfloat16, enabled=lower):
                self.trainer.update(step, batch.bfloat16() if lower else batch)

    @property
    @override
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.ae.W_enc if self.task.architecture == "jumprelu" else self.ae.encoder.weight.T

    @property
    @override
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.ae.W_dec if self.task.architecture == "jumprelu" else self.ae.decoder.weight.T

    @override
    def set_threshold(self, threshold: float) -> None:
        match self.task.architecture:
            case "relu":
                self.ae.encoder.bias.fill_(-threshold)
            case "gated":
                self.ae.gate_bias.fill_(-threshold)
            case "jumprelu":
                self.ae.threshold.fill_(threshold)

    @override
    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        return self.latents(x).count_nonzero().item() / len(x)

    @override
    def latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        if self.task.architecture == "batchtopk":  # as in training, not by the threshold
            return self.ae.encode(x, use_threshold=False)
        return self.ae.encode(x)

    @override
    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        return self.ae.decode(f)


def _settings(task: Task) -> dict[str, Any]:
    match task.architecture:
        case "relu" | "gated":
            return {"l1_penalty": task.l1_coefficient, "sparsity_warmup_steps": None}
        case "jumprelu":
            return {"target_l0": float(task.l0), "sparsity_warmup_steps": None}
    # The running threshold from the start: it is part of every step but the first thousand.
    return {"k": task.k, "threshold_start_step": 0}
