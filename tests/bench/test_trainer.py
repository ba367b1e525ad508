import json
from pathlib import Path

import pytest

from lightning_sae.cli import main

TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.default_root_dir=run",
    "--trainer.max_steps=1000",
    "--model=lightning_sae.ReLUSAE",
    "--model.d_sae=256",
    "--model.lr_decay_steps=500",
    "--data=lightning_sae.ActivationDataModule",
    "--data.hook_name=blocks.0.hook_resid_post",
    "--data.context_length=32",
    "--data.blocks_per_pass=8",
    "--data.batch_size=128",
    "--data.buffer_size=512",
    "--data.scale=true",
    "--steps=6",
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What `lightning-sae bench` writes for a small SAE and an L0 of 10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bench"))
        patch.setattr("sys.argv", ["lightning-sae"])
        main(["bench", *TINY, "--l0=10"])
        return json.loads(Path("run/bench.json").read_text())


def test_the_step_is_the_sum_of_its_stages(figures: dict[str, float]) -> None:
    stages = ("forward_seconds", "backward_seconds", "optimizer_seconds", "rest_seconds")
    assert all(figures[stage] > 0 for stage in stages)
    # Medians of parts and of the whole, of few steps: equal up to the scatter of the steps.
    whole = figures["step_seconds"]
    assert sum(figures[stage] for stage in stages) == pytest.approx(whole, rel=0.8)
    assert figures["product_seconds"] < figures["floor_seconds"]


def test_the_sae_measured_has_the_l0_asked_for(figures: dict[str, float]) -> None:
    assert figures["l0"] == pytest.approx(10, rel=0.3)


def test_rates_hours_and_bytes_fit_together(figures: dict[str, float]) -> None:
    assert figures["training_activations_per_second"] == 128 / figures["step_seconds"]
    hours = 1000 * 128 / figures["together_activations_per_second"] / 3600
    assert figures["planned_hours"] == pytest.approx(hours)
    weights = 4 * (2 * 128 * 256 + 256 + 128)
    assert figures["state_bytes"] == 4 * weights
    assert figures["buffer_bytes"] == 512 * 128 * 4
    assert figures["checkpoint_bytes"] == 3 * weights + figures["buffer_bytes"]


def test_an_earlier_file_is_kept_and_the_last_line_names_the_new_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("b.json").write_text("mine")
    main(["bench", *TINY, "--output=b.json"])
    assert Path("b.json").read_text() == "mine"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Made: b-2.json"
    assert json.loads(Path("b-2.json").read_text())["architecture"] == "ReLUSAE"
    assert "times the floor" in out
