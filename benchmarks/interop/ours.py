"""SAEs trained here, a little, on the embedded language model."""

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from lightning_sae import (
    ActivationDataModule,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    SparseAutoencoder,
    TiedSAE,
    TopKSAE,
    load,
)

RESIDUAL, HEADS = "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"
STEPS, D_SAE = 100, 512
FREE = {"decoder_norm": "free"}
NOT_SUBTRACTED = {"apply_b_dec_to_input": False}
SCALED = True


class Case(NamedTuple):
    """An SAE to be trained.

    Attributes:
        kind: Its class.
        arguments: Its arguments besides sizes and rate.
        scaled: Whether activations are centred and scaled in training.
        hook: Where.
        dtype: What its weights are converted to.
    """

    kind: type[SparseAutoencoder]
    arguments: dict[str, Any]
    scaled: bool = False
    hook: str = RESIDUAL
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The case in words."""
        words = [self.kind.__name__]
        words += [f"{key}={value}" for key, value in self.arguments.items() if key in SHOWN]
        words += ["centred and scaled"] * self.scaled
        words += ["attn.hook_z"] * (self.hook == HEADS)
        words += ["bfloat16"] * (self.dtype == torch.bfloat16)
        return ", ".join(words)


SHOWN = ("k", "decoder_norm", "apply_b_dec_to_input", "fixed_prefixes", "threshold_init")

CASES = (
    Case(ReLUSAE, {"l1_coefficient": 1.0}),
    Case(ReLUSAE, {"l1_coefficient": 1.0}, SCALED),
    Case(ReLUSAE, {"l1_coefficient": 1.0, **FREE}, SCALED),
    Case(ReLUSAE, {"l1_coefficient": 1.0, **NOT_SUBTRACTED}, SCALED),
    Case(ReLUSAE, {"l1_coefficient": 1.0}, SCALED, HEADS),
    Case(ReLUSAE, {"l1_coefficient": 1.0}, SCALED, RESIDUAL, torch.bfloat16),
    Case(TiedSAE, {"l1_coefficient": 1.0}, SCALED),
    Case(GatedSAE, {"l1_coefficient": 1.0}),
    Case(GatedSAE, {"l1_coefficient": 1.0, **FREE}, SCALED),
    Case(GatedSAE, {"l1_coefficient": 1.0, **NOT_SUBTRACTED}, SCALED),
    Case(RescaleAndShiftSAE, {"l1_coefficient": 1.0}, SCALED),
    Case(JumpReLUSAE, {}),
    Case(JumpReLUSAE, {}, SCALED),
    Case(JumpReLUSAE, FREE, SCALED),
    Case(JumpReLUSAE, NOT_SUBTRACTED, SCALED),
    Case(JumpReLUSAE, {}, SCALED, RESIDUAL, torch.bfloat16),
    Case(TopKSAE, {"k": 16}),
    Case(TopKSAE, {"k": 16}, SCALED),
    Case(TopKSAE, {"k": 16, **FREE}, SCALED),
    Case(TopKSAE, {"k": 16, **NOT_SUBTRACTED}, SCALED),
    Case(TopKSAE, {"k": 16}, SCALED, HEADS),
    Case(TopKSAE, {"k": 16}, SCALED, RESIDUAL, torch.bfloat16),
    Case(BatchTopKSAE, {"k": 16}),
    Case(BatchTopKSAE, {"k": 16.5}, SCALED),
    Case(BatchTopKSAE, {"k": 16, **FREE}, SCALED),
    Case(BatchTopKSAE, {"k": 16}, SCALED, HEADS),
    Case(MatryoshkaSAE, {"k": 16}),
    Case(MatryoshkaSAE, {"k": 16}, SCALED),
)


def trained() -> Iterator[tuple[Case, SparseAutoencoder]]:
    """Each case, and the SAE trained."""
    for case in CASES:
        torch.manual_seed(0)
        data = data_at(case.hook, case.scaled)
        sae = case.kind(d_in=data.d_in, d_sae=D_SAE, lr=2e-3, **case.arguments)
        quiet_trainer().fit(sae, datamodule=data)
        if case.dtype != torch.float32:  # scaling is folded before digits are dropped
            with TemporaryDirectory() as folder:
                sae = load(sae.save_pretrained(folder), dtype=case.dtype)
        yield case, sae.eval()


def data_at(hook: str, scaled: bool = False) -> ActivationDataModule:
    """Activations of the embedded model."""
    return ActivationDataModule(
        hook, center=scaled, scale=scaled, batch_size=512, buffer_size=8192, context_length=128
    )


def quiet_trainer() -> Trainer:
    """A trainer that writes nothing."""
    return Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
