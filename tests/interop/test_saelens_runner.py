"""SAELens' training configurations as ours; the files are those that SAELens 6.54.12 writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sae import ActivationDataModule, BatchTopKSAE
from lightning_sae.callbacks import L1Warmup
from lightning_sae.cli import main
from lightning_sae.commands.import_export import import_main
from lightning_sae.interop.saelens_runner import plan_of

RUNNER: dict[str, Any] = {
    "model_name": "EleutherAI/pythia-70m",
    "hook_name": "blocks.1.hook_resid_post",
    "hook_head_index": None,
    "dataset_path": "some/text",
    "streaming": True,
    "context_size": 64,
    "n_batches_in_buffer": 200,
    "training_tokens": 4096 * 1000,
    "train_batch_size_tokens": 4096,
    "store_batch_size_prompts": 16,
    "seqpos_slice": [1, 64],
    "disable_concat_sequences": False,
    "sequence_separator_token": "bos",
    "activations_mixing_fraction": 0.25,
    "seed": 7,
    "prepend_bos": True,
    "adam_beta1": 0.5,
    "adam_beta2": 0.99,
    "lr": 5e-4,
    "lr_scheduler_name": "constant",
    "lr_warm_up_steps": 10,
    "lr_decay_steps": 200,
    "dead_feature_window": 50,
    "exclude_special_tokens": True,
    "device": "cuda",
    "compile_sae": False,
    "something_new": 1,
}
SAE = {
    "d_in": 512,
    "d_sae": 96,
    "apply_b_dec_to_input": False,
    "normalize_activations": "expected_average_only_in",
    "decoder_init_norm": 0.1,
}
BATCH_TOPK = {
    "architecture": "batchtopk",
    "k": 8.5,
    "aux_loss_coefficient": 1.0,
    "rescale_acts_by_decoder_norm": True,
    "topk_threshold_lr": 0.05,
}


def written(folder: Path, sae: dict[str, Any], **changed: Any) -> Path:
    path = folder / "runner_cfg.json"
    path.write_text(json.dumps({**RUNNER, **changed, "sae": {**SAE, **sae}}))
    return path


def test_the_configuration_is_one_that_fit_takes(tmp_path: Path, capsys: Any) -> None:
    path = written(tmp_path, BATCH_TOPK, model_name="embedded", dataset_path="embedded")
    import_main(["--config", str(path), "--output", str(tmp_path / "fit.yaml")])
    said = capsys.readouterr().out
    assert "aux_loss_coefficient" in said
    assert "`something_new`: not known" in said
    assert "compile_sae" not in said
    assert str(tmp_path / "fit.yaml") in said
    cli = main(["--config", str(tmp_path / "fit.yaml")], run=False)
    sae, data = cli.model, cli.datamodule
    assert isinstance(sae, BatchTopKSAE)
    assert (sae.k, sae.d_sae, sae.d_in, sae.apply_b_dec_to_input) == (8.5, 96, 128, False)
    assert (sae.lr, sae.betas, sae.dead_after) == (5e-4, (0.5, 0.99), 50 * 4096)
    assert (sae.lr_warmup_steps, sae.lr_decay_steps, sae.decoder_norm) == (10, 200, "unit")
    assert isinstance(data, ActivationDataModule)
    assert (data.context_length, data.batch_size, data.buffer_size) == (64, 4096, 200 * 64)
    assert data.source["positions"] in ((1, 64), [1, 64])
    assert (data.source["document_start"], data.source["separator"]) == ("bos", "none")
    assert cli.trainer.max_steps == 1000


@pytest.mark.parametrize(
    ("sae", "expected"),
    [
        (
            {"architecture": "standard", "l1_coefficient": 3.0, "l1_warm_up_steps": 100},
            {"l1_coefficient": 3.0, "decoder_norm": "free", "decoder_init_norm": 0.1},
        ),
        (
            {
                "architecture": "jumprelu",
                "l0_coefficient": 2.0,
                "l0_warm_up_steps": 100,
                "jumprelu_init_threshold": 0.02,
                "jumprelu_bandwidth": 0.5,
                "target_l0": None,
            },
            {"l0_coefficient": 2.0, "threshold_init": 0.02, "bandwidth": 0.5},
        ),
        (
            {"architecture": "matryoshka_batchtopk", "k": 4, "matryoshka_widths": [8, 32]},
            {"k": 4, "prefixes": [8, 32, 96]},
        ),
    ],
    ids=lambda value: value.get("architecture", ""),
)
def test_each_architecture_has_its_own_settings(
    sae: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = plan_of(written(tmp_path, sae)).config
    assert expected.items() <= config["model"]["init_args"].items()
    callbacks = config["trainer"].get("callbacks", [])
    assert [each["init_args"] for each in callbacks] == [{"n_steps": 100}] * len(callbacks)
    assert bool(callbacks) == any(name.endswith("_warm_up_steps") for name in sae)
    assert L1Warmup.__name__ in str(callbacks) or not callbacks


def test_the_norm_of_the_first_decoder_rows_is_taken_over_or_named(tmp_path: Path) -> None:
    standard = {"architecture": "standard"}
    plan = plan_of(written(tmp_path, {**standard, "decoder_init_norm": 0.3}))
    assert plan.config["model"]["init_args"]["decoder_init_norm"] == 0.3
    assert "decoder_init_norm" not in " ".join(plan.differs)
    for other in ({**standard, "decoder_init_norm": None}, BATCH_TOPK):
        plan = plan_of(written(tmp_path, other))
        assert "decoder_init_norm" not in plan.config["model"]["init_args"]
        assert "`decoder_init_norm`: decoder rows start at norm 1 here" in plan.differs


def test_unsupported_settings_are_named(tmp_path: Path) -> None:
    sae = {"architecture": "standard", "lp_norm": 0.5, "normalize_activations": "layer_norm"}
    path = written(tmp_path, sae, lr_scheduler_name="cosineannealing", seqpos_slice=[1, None])
    differs = " ".join(plan_of(path.parent).differs)
    for name in ("lp_norm", "layer_norm", "cosineannealing", "seqpos_slice"):
        assert name in differs


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it trains `temporal`, and this package has standard"):
        plan_of(written(tmp_path, {"architecture": "temporal"}))
    (tmp_path / "runner_cfg.json").write_text("{}")
    with pytest.raises(ValueError, match="it has no `sae` and `training_tokens`"):
        plan_of(tmp_path)
    written(tmp_path, BATCH_TOPK)
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(ValueError, match="`output` to be a new file but got .* exists"):
        import_main(["--config", str(tmp_path), "--output", str(tmp_path / "there.yaml")])
    with pytest.raises(ValueError, match="either an SAE or the argument `config` but got neither"):
        import_main(["--output", str(tmp_path / "out")])
