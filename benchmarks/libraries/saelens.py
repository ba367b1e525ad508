"""SAELens, trained by its `SAETrainer.fit`."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import override

from benchmarks.language_model_source import L1_COEFFICIENT, LR, Source, layer_name
from benchmarks.libraries.base import Contender, Task
from benchmarks.measure import Watch
from lightning_sae import ActivationDataModule

NAMES = {"relu": "standard"}  # architectures that SAELens names differently


class Trained(Contender):
    """A training SAE with the library's defaults: free decoder norms, clipping, torch's Adam."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        self.task = task
        name = NAMES.get(task.architecture, task.architecture)
        cls, config = get_sae_training_class(name)
        self.sae: Any = cls(
            config(d_in=task.d_in, d_sae=task.d_sae, device=task.device, **_settings(task))
        )

    @override
    def train(self, watch: Watch) -> None:
        batch_size = self.task.batch_size
        total, lr = len(watch) * batch_size, self.task.lr
        config = SAETrainerConfig(
            total,
            batch_size,
            lr=lr,
            lr_end=lr / 10,
            device=self.task.device,
            autocast=self.task.precision == "bf16-mixed",
        )
        with contextlib.suppress(StopIteration):
            SAETrainer(config, self.sae, watch).fit()

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
        match self.task.architecture:
            case "relu":
                self.sae.b_enc.fill_(-threshold)
            case "gated":
                self.sae.b_gate.fill_(-threshold)
            case "jumprelu":
                self.sae.threshold.fill_(threshold)

    @override
    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        return self.latents(x).count_nonzero().item() / len(x)

    @override
    def latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return self.sae.encode(x)

    @override
    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        return self.sae.decode(f)


def _settings(task: Task) -> dict[str, Any]:
    match task.architecture:
        case "relu" | "gated":
            return {"l1_coefficient": task.l1_coefficient}
        case "topk" | "batchtopk":
            return {"k": task.k}
    return {}


def language_model_run(
    source: Source, data: ActivationDataModule, d_sae: int, n_steps: int, variant: str
) -> Callable[[], Any]:
    """Prepare a run of `LanguageModelSAETrainingRunner` on the blocks that our stream reads.

    The blocks are passed as tokens, so SAELens does not tokenize. The variant `defaults` uses
    SAELens' buffer of 20 blocks without prefetch; otherwise both settings are ours.
    """
    sae = StandardTrainingSAEConfig(
        d_in=data.d_in,
        d_sae=d_sae,
        l1_coefficient=L1_COEFFICIENT,
        normalize_activations="expected_average_only_in",
    )
    network = data.language_model.network
    blocks = n_steps * source.batch_size // source.context_length
    like_ours = {
        "n_batches_in_buffer": source.buffer_size // source.context_length,
        "prefetch_llm_batches": True,
    }
    config = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=str(data.model),
        model_class_name="AutoModelForCausalLM",  # the fastest that it offers for a local folder
        hook_name=layer_name(network, source.layer),
        is_dataset_tokenized=True,
        streaming=False,
        context_size=source.context_length,
        store_batch_size_prompts=source.blocks_per_pass,
        train_batch_size_tokens=source.batch_size,
        training_tokens=n_steps * source.batch_size,
        exclude_special_tokens=data.language_model.tokenizer.all_special_ids,
        n_batches_for_norm_estimate=1,
        lr=LR,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        **({} if variant == "defaults" else like_ours),
    )
    ahead = 2 * source.buffer_size // source.context_length
    tokens = data.training_blocks().read(blocks + ahead)
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
    return LanguageModelSAETrainingRunner(config, override_dataset=dataset).run
