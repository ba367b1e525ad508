"""The examples of docs/extending.md, run as they stand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sae.callbacks import HeldOutEvaluation


@pytest.fixture(scope="module")
def examples(repository: Path) -> dict[str, Any]:
    """What the code blocks of the page define."""
    page = (repository / "docs" / "extending.md").read_text()
    found: dict[str, Any] = {"__name__": "extending"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/extending.md", "exec"), found)
    return found


def trainer(folder: Path, **arguments: Any) -> Trainer:
    settings = {"max_steps": 30, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{**settings, **quiet, "default_root_dir": folder, **arguments})


@pytest.fixture
def data(examples: dict[str, Any]) -> Any:
    firing = torch.rand(1280, 12) < 0.2
    return examples["SavedActivations"](firing.float() @ torch.randn(12, 8) + 3)


@pytest.mark.parametrize("name", ["ThresholdSAE", "NormalisedBatchSAE", "MeasuredSAE"])
def test_an_architecture_of_ones_own_trains_and_is_saved(
    name: str, examples: dict[str, Any], data: Any, tmp_path: Path
) -> None:
    sae = examples[name](8, 16, lr=1e-2)
    held_out = data.held_out
    trainer(tmp_path, max_steps=1).fit(sae, datamodule=data)
    before = (sae(held_out) - held_out).pow(2).mean()
    trainer(tmp_path, max_steps=60).fit(sae, datamodule=data)
    assert (sae(held_out) - held_out).pow(2).mean() < before
    again = type(sae).from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    torch.testing.assert_close(again(held_out), sae(held_out), rtol=1e-3, atol=1e-4)


def test_a_rule_over_the_batch_keeps_to_its_number_of_latents(
    examples: dict[str, Any], data: Any
) -> None:
    sae = examples["NormalisedBatchSAE"](8, 16, k=3)
    assert not sae.rows_are_independent
    assert sae.latents(torch.randn(64, 8)).firings().sum() <= 3 * 64


def test_a_penalty_of_ones_own_is_minimised(
    examples: dict[str, Any], data: Any, tmp_path: Path
) -> None:
    from lightning_sae import ReLUSAE

    penalty = examples["Saturating"](scale=2.0)
    sae = ReLUSAE(8, 16, penalty=penalty, l1_coefficient=0.5)
    x = torch.randn(32, 8)
    step = sae.objective(x)
    expected = 0.5 * penalty(sae.activate(sae.pre_activations(x))).sum(-1).mean()
    torch.testing.assert_close(step.losses["l1"], expected)


def test_a_callback_of_ones_own_ends_the_run(
    examples: dict[str, Any], data: Any, tmp_path: Path
) -> None:
    from lightning_sae import ReLUSAE

    stop = examples["StopWhenSparse"](target=16, patience=5)
    run = trainer(tmp_path, callbacks=stop)
    run.fit(ReLUSAE(8, 16), datamodule=data)
    assert run.global_step == 5


def test_a_metric_of_ones_own_is_among_the_results(
    examples: dict[str, Any], data: Any, tmp_path: Path
) -> None:
    evaluation = HeldOutEvaluation()
    run = trainer(tmp_path, callbacks=evaluation)
    sae = examples["MeasuredSAE"](8, 16)
    run.test(sae, datamodule=data, verbose=False)
    f = sae.encode(data.held_out)
    assert evaluation.results["mean_strength"] == pytest.approx(f[f > 0].mean().item(), rel=1e-5)


def test_a_study_of_ones_own_writes_its_report_and_resumes(
    examples: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.txt", "held-out.txt"):
        (tmp_path / name).write_text("def f(x):\n    return x + 1\n" * 200)
    texts = {"text": str(tmp_path / "train.txt")}
    texts["validation_text"] = str(tmp_path / "held-out.txt")
    sizes = {"context_length": 16, "d_sae": 24, "steps": 4, "batch_size": 64, "buffer_size": 256}
    settings = {**texts, **sizes, "held_out_tokens": 256, "output": str(tmp_path / "study")}
    examples["top_k"](ks=(2, 5), seeds=1, **settings)
    rows = json.loads((tmp_path / "study" / "results.json").read_text())
    assert [row["k"] for row in rows] == [2, 5]
    assert rows[0]["l0"] <= 2 < rows[1]["l0"] <= 5
    assert "data:image/png;base64," in (tmp_path / "study" / "report.html").read_text()
    first = (tmp_path / "study" / "seed-0" / "evaluation.json").stat().st_mtime_ns
    examples["top_k"](ks=(2, 5), seeds=1, **settings)
    assert (tmp_path / "study" / "seed-0" / "evaluation.json").stat().st_mtime_ns == first
    assert capsys.readouterr().out.splitlines()[-1].startswith("Made: ")
