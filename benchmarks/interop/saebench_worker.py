"""The process that runs SAEBench; see `benchmarks.interop.saebench`."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.evals.core.main import multiple_evals
from transformer_lens import HookedTransformer

from benchmarks.interop.ours import RESIDUAL, data_at, quiet_trainer
from benchmarks.interop.saebench import NAME
from lightning_sae import BatchTopKSAE, SparseAutoencoder
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.load_model import load_language_model
from lightning_sae.interop.saebench import for_saebench

FIGURES = {
    "sparsity": ("l0",),
    "reconstruction_quality": ("explained_variance", "mse", "cossim"),
    "model_performance_preservation": ("ce_loss_score", "ce_loss_with_sae", "ce_loss_without_sae"),
    "shrinkage": ("l2_ratio", "relative_reconstruction_bias"),
}


def evaluate(folder: Path) -> dict[str, Any]:
    """Train an SAE and have SAEBench look at it."""
    torch.manual_seed(0)
    data = data_at(RESIDUAL, scaled=True)
    sae = BatchTopKSAE(d_in=data.d_in, d_sae=512, k=16, lr=2e-3, decoder_norm="free")
    quiet_trainer().fit(sae, datamodule=data)
    theirs: Any = for_saebench(sae.eval(), NAME)
    unit = BaseSAE.check_decoder_norms(theirs)
    BaseSAE.test_sae(theirs, NAME)
    difference = hooked_difference(sae)
    results = multiple_evals(
        [("lightning-sae", theirs)],
        n_eval_reconstruction_batches=8,
        n_eval_sparsity_variance_batches=16,
        eval_batch_size_prompts=8,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=str(_text(folder / "text")),
        context_size=128,
        output_folder=str(folder / "results"),
        dtype="float32",
        device="cpu",
    )
    metrics = results[0]["metrics"]
    named = {f"{g}.{name}": metrics[g][name] for g, names in FIGURES.items() for name in names}
    return {
        "sae": "BatchTopKSAE, k=16",
        "check_decoder_norms": unit,
        "test_sae": True,
        **named,
        SPLICED: difference,
    }


SPLICED = "logits, spliced into a HookedTransformer of transformer-lens 3.9"


@torch.no_grad()
def hooked_difference(sae: SparseAutoencoder) -> float:
    """The lines of docs/splicing.md against this package's own splicing, as a share."""
    tokens = torch.arange(3, 67).view(2, 32)
    own = load_language_model(EMBEDDED_MODEL, RESIDUAL).logits(tokens, sae)
    model: Any = HookedTransformer.from_pretrained_no_processing(NAME, device="cpu")
    with model.hooks(fwd_hooks=[(RESIDUAL, lambda x, hook: sae(x))]):  # noqa: ARG005
        logits = model(tokens)
    return float((logits - own).abs().max() / own.abs().max())


def _text(folder: Path) -> Path:
    """The text of some modules of Python, as a data set of lines."""
    folder.mkdir()
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:80]
    rows = [json.dumps({"text": path.read_text(errors="replace")}) for path in sources]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(found) + "\n")
