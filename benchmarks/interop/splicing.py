"""The three lines of docs/splicing.md in TransformerLens, against this package's own splicing."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.interop import ours
from lightning_sae import TopKSAE
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.load_model import load_language_model


@torch.no_grad()
def spliced(_folder: Path) -> dict[str, Any]:
    """Largest difference of logits, as a share of the largest, and whether splicing changed any."""
    torch.manual_seed(0)
    data = ours.data_at(ours.RESIDUAL)
    sae = TopKSAE(d_in=data.d_in, d_sae=ours.D_SAE, k=16, lr=2e-3)
    ours.quiet_trainer().fit(sae, datamodule=data)
    sae.eval()
    tokens = torch.randint(3, 500, (2, 32))
    own = load_language_model(EMBEDDED_MODEL, ours.RESIDUAL).logits(tokens, sae)
    model = TransformerBridge.boot_transformers(str(EMBEDDED_MODEL), device="cpu")

    hook = sae.source["hook_name"]
    with model.hooks(fwd_hooks=[(hook, lambda x, hook: sae(x))]):  # noqa: ARG005
        logits = model(tokens)

    return {
        "transformer_lens": version("transformer-lens"),
        "difference": float((logits - own).abs().max() / own.abs().max()),
        "changed": float((model(tokens) - own).abs().max()),
    }
