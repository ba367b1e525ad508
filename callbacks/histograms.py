"""One number for each latent, as histograms."""

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from lightning_sae.callbacks.loggers import log_histograms
from lightning_sae.distributed.split import parts_of


class Histograms(Callback):
    """Histograms of the latents after each validation, for TensorBoard and wandb.

    `latents/log10_frequency` on the held-out activations (a latent that never fired counts as
    half a firing, so that the logarithm is finite), `latents/encoder_decoder_cosine`,
    `latents/decoder_norm` and `latents/encoder_bias`.
    """

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not (trainer.is_global_zero or parts_of(trainer).n > 1):
            return
        found = latent_statistics(pl_module)
        if trainer.is_global_zero:
            named = {f"latents/{name}": values for name, values in found.items()}
            log_histograms(trainer.loggers, named, trainer.global_step)


@torch.no_grad()
def latent_statistics(sae: Any) -> dict[str, Float[Tensor, " d_sae"]]:
    """The values that `Histograms` draws, one per latent; of a split dictionary, of all parts."""
    statistics = {
        "encoder_decoder_cosine": cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1),
        "decoder_norm": sae.W_dec.norm(dim=-1),
        "encoder_bias": sae.b_enc.detach(),
    }
    statistics = {name: sae.parts.joined(values) for name, values in statistics.items()}
    if sae.held_out_frequency is not None:
        floor = 0.5 / sae.held_out_count
        statistics["log10_frequency"] = sae.held_out_frequency.clamp_min(floor).log10()
    return {name: values.float().cpu() for name, values in statistics.items()}
