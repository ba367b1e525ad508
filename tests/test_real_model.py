"""On a language model and text that nobody here made; skipped where they are not at hand."""

import json
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from lightning_sae import ActivationDataModule, ReLUSAE
from lightning_sae.analysis import evaluate_in_model
from lightning_sae.cli import main
from lightning_sae.data.load_model import load_language_model

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def data(real_model: Path, real_text: Path) -> ActivationDataModule:
    return ActivationDataModule(
        HOOK,
        real_model,
        text=real_text / "tinystories_train.txt",
        validation_text=real_text / "tinystories_heldout.txt",
        context_length=512,
        blocks_per_pass=8,
    )


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.mlp.hook_post", "blocks.4.hook_mlp_out"])
def test_hooks_are_those_of_transformer_lens(real_model: Path, hook: str) -> None:
    bridge = TransformerBridge.boot_transformers(str(real_model))
    tokens = torch.randint(3, 500, (2, 64))
    ours = load_language_model(real_model, hook).activations(tokens)
    torch.testing.assert_close(
        ours, load_language_model(bridge, hook).activations(tokens), atol=1e-4, rtol=1e-4
    )


def test_cross_entropies_are_those_measured_elsewhere(data: ActivationDataModule) -> None:
    """Packed windows, BOS before each story: 1.486 clean, log V = 6.238 with nothing at the hook.

    Here the BOS activations are left alone and BOS is no target, so the figures are near.
    """
    sae = ReLUSAE(64, 8)
    with torch.no_grad():  # reconstructs zero
        sae.W_dec.zero_()
    results = evaluate_in_model(sae, data, 16384)
    assert results["ce_clean"] == pytest.approx(1.486, abs=0.06)
    assert results["ce_spliced"] == pytest.approx(results["ce_zero_ablation"], abs=1e-6)
    assert results["ce_zero_ablation"] > 5.5
    assert results["ce_clean"] < results["ce_mean_ablation"] < results["ce_zero_ablation"]


def test_the_main_job_runs_on_it(
    real_model: Path, real_text: Path, repository: Path, tmp_path: Path
) -> None:
    config = repository / "configs" / "quickstart.yaml"
    root = tmp_path / "run"
    changed = [
        f"--trainer.default_root_dir={root}",
        "--trainer.max_steps=60",
        "--trainer.val_check_interval=60",
        "--trainer.callbacks=lightning_sae.callbacks.DecoderNormProjection",
        "--model.d_sae=256",
        "--model.l1_coefficient=0.5",
        "--model.lr=0.003",
        "--model.lr_warmup_steps=0",
        "--model.lr_decay_steps=0",
        f"--data.hook_name={HOOK}",
        f"--data.model={real_model}",
        f"--data.text={real_text / 'tinystories_train.txt'}",
        "--data.buffer_size=16384",
        "--data.n_validation=4096",
        "--data.n_test=4096",
        "--evaluation.n_tokens=4096",
    ]
    main(["fit", f"--config={config}", *changed])
    main(["test", f"--config={root}/config.yaml", f"--ckpt_path={root}/checkpoints/last.ckpt"])
    results = json.loads((root / "results.json").read_text())
    assert results["explained_variance"] > 0.7
    assert results["loss_recovered_zero"] > 0.7
