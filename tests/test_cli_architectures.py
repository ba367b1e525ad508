"""Every architecture from the command line, on toy data."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import lightning_sae
from lightning_sae.cli import main
from lightning_sae.functional.penalties import L1, Sqrt

SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=lightning_sae.callbacks.DecoderNormProjection",
    "--progress_bar.refresh_rate=0",
    "--model.d_sae=16",
    "--model.lr=0.01",
    "--data=lightning_sae.ToyDataModule",
    "--data.n_features=8",
    "--data.d_in=8",
    "--data.batch_size=32",
    "--data.n_test=64",
    "--data.center=true",
    "--data.scale=true",
]
SQRT = ["--model.penalty=lightning_sae.functional.penalties.Sqrt", "--model.penalty.epsilon=0.01"]
MODELS = {
    "ReLUSAE": ["--model.l1_coefficient=0.1"],
    "ReLUSAE-sqrt": SQRT,
    "TiedSAE": [],
    "TiedSAE-sqrt": SQRT,
    "TiedSAE-jump": ["--model.threshold_init=0.1"],
    "GatedSAE": ["--model.auxiliary_decoder=live"],
    "GatedSAE-sqrt": SQRT,
    "JumpReLUSAE": ["--model.target_l0=3", "--model.threshold_lr=0.1"],
    "JumpReLUSAE-sqrt": SQRT,
    "TopKSAE": ["--model.k=3"],
    "BatchTopKSAE": ["--model.k=2.5"],
    "MatryoshkaSAE": ["--model.k=3", "--model.prefixes=[4,16]"],
    "MatryoshkaSAE-drawn": ["--model.k=3", "--model.prefixes=3"],
    "MatryoshkaSAE-sqrt": ["--model.k=null", *SQRT],
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_goes_on_and_is_exported_and_tested(name: str, tmp_path: Path) -> None:
    root, kind = tmp_path / "run", name.split("-")[0]
    model = [f"--model=lightning_sae.{kind}", *MODELS[name]]
    cli = main(["fit", *model, *SMALL, f"--trainer.default_root_dir={root}"])
    exported = lightning_sae.load(root / "sae")
    assert type(exported).__name__ == kind
    assert (exported.d_in, exported.d_sae) == (8, 16)
    penalty = Sqrt(epsilon=0.01) if SQRT[0] in model else getattr(cli.model, "penalty", None)
    x = torch.randn(9, 8)
    last = root / "checkpoints" / "last.ckpt"
    for sae in (exported, lightning_sae.load(last)):
        torch.testing.assert_close(sae.encode(x), cli.model.encode(x), rtol=1e-4, atol=1e-5)
        assert getattr(sae, "penalty", None) == penalty

    again = [f"--config={root}/config.yaml", f"--ckpt_path={last}"]
    resumed = main(["fit", *again, "--trainer.max_steps=5"])
    assert resumed.trainer.global_step == 5
    assert getattr(resumed.model, "penalty", None) == penalty
    main(["test", *again])
    assert json.loads((root / "results.json").read_text())["l0"] > 0


@pytest.mark.parametrize("name", ["ReLUSAE", "ReLUSAE-sqrt", "MatryoshkaSAE"])
def test_the_printed_configuration_is_the_one_that_was_given(name: str, capsys) -> None:
    model = [f"--model=lightning_sae.{name.split('-')[0]}", *MODELS[name]]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *model, *SMALL, "--print_config"])
    assert not stopped.value.code
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    if name == "ReLUSAE-sqrt":
        assert arguments["penalty"]["class_path"] == "lightning_sae.functional.penalties.Sqrt"
        assert arguments["penalty"]["init_args"]["epsilon"] == 0.01
    elif name == "ReLUSAE":
        assert arguments["penalty"] is None
    else:
        assert (arguments["k"], arguments["prefixes"]) == (3, [4, 16])


def test_without_a_word_on_it_the_penalty_is_l1() -> None:
    cli = main(["--model=lightning_sae.ReLUSAE", *SMALL], run=False)
    assert cli.model.penalty == L1()
