"""What TensorBoard shows in addition to the losses."""

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from lightning_sae.data.source import source_of


class Histograms(Callback):
    """Histograms of the latents for TensorBoard after each validation.

    `latents/log10_frequency` on the held-out activations (a latent that never fired counts as
    half a firing, so that the logarithm is finite), `latents/encoder_decoder_cosine`,
    `latents/decoder_norm` and `latents/encoder_bias`.
    """

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, values in latent_statistics(pl_module).items():
                    logger.experiment.add_histogram(f"latents/{name}", values, trainer.global_step)


@torch.no_grad()
def latent_statistics(sae: Any) -> dict[str, Float[Tensor, " d_sae"]]:
    """The values that `Histograms` draws, one per latent."""
    statistics = {
        "encoder_decoder_cosine": cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1),
        "decoder_norm": sae.W_dec.norm(dim=-1),
        "encoder_bias": sae.b_enc.detach(),
    }
    if sae.held_out_frequency is not None:
        floor = 0.5 / sae.held_out_count
        statistics["log10_frequency"] = sae.held_out_frequency.clamp_min(floor).log10()
    return {name: values.float().cpu() for name, values in statistics.items()}


class StreamMonitor(Callback):
    """Logs the stream's counts of what was read and left out as `data/...`, with the losses."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = source_of(trainer)
        if data is not None:
            statistics = data.statistics()
            pl_module.log_dict({f"data/{name}": value for name, value in statistics.items()})
