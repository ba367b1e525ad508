import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import ActivationSource, ReLUSAE
from lightning_sae.callbacks import ExportSAE, HeldOutEvaluation, SAEProgressBar, StreamMonitor
from lightning_sae.callbacks.histograms import latent_statistics
from lightning_sae.callbacks.results import unused


class Counted(ActivationSource):
    """Random activations, and a stream's statistics."""

    d_in = 4

    def train_dataloader(self) -> "DataLoader[Tensor]":
        return DataLoader(torch.randn(160, 4), batch_size=16)  # type: ignore[arg-type]

    test_dataloader = train_dataloader

    def statistics(self) -> dict[str, float]:
        return {"seen": 7.0, "dropped_norm": 0.25}


def trainer(root: Path, **arguments: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": root,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
    )


def test_latent_statistics_are_one_number_per_latent() -> None:
    sae = ReLUSAE(2, 3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0, 0.0], [0.0, -1.0], [0.0, 2.0]]))
        sae.b_enc.copy_(torch.tensor([0.1, 0.2, 0.3]))
    sae.held_out_frequency = torch.tensor([0.1, 0.0, 1.0], dtype=torch.float64)
    sae.held_out_count = 50
    statistics = latent_statistics(sae)
    torch.testing.assert_close(
        statistics["encoder_decoder_cosine"], torch.tensor([1.0, -1.0, 2**-0.5])
    )
    torch.testing.assert_close(statistics["decoder_norm"], torch.tensor([3.0, 1.0, 2.0]))
    torch.testing.assert_close(statistics["encoder_bias"], torch.tensor([0.1, 0.2, 0.3]))
    # never fired on 50 activations: shown as half a firing, 0.01
    torch.testing.assert_close(statistics["log10_frequency"], torch.tensor([-1.0, -2.0, 0.0]))


def test_statistics_of_the_stream_are_logged_with_the_rest(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(
        tmp_path, max_steps=4, logger=logger, callbacks=[StreamMonitor()], log_every_n_steps=2
    )
    fit.fit(ReLUSAE(4, 6, decoder_norm="free"), datamodule=Counted())
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["data/seen"]]
    assert [row["step"] for row in rows] == ["1", "3"]
    assert {row["data/dropped_norm"] for row in rows} == {"0.25"}


def test_progress_bar_counts_the_whole_run_and_shows_the_rate(
    tmp_path: Path,
) -> None:
    bar = SAEProgressBar(refresh_rate=2)
    fit = trainer(
        tmp_path,
        max_steps=4,
        accumulate_grad_batches=2,
        callbacks=[bar],
        enable_progress_bar=True,
    )
    fit.fit(ReLUSAE(4, 6, decoder_norm="free"), datamodule=Counted())
    assert bar.total_train_batches == 8
    assert bar.rate > 0
    assert {"loss", "l0", "dead"} <= bar.get_metrics(fit, fit.lightning_module).keys()


def test_a_log_file_gets_a_line_for_each_tenth_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = SAEProgressBar(refresh_rate=1)
    fit = trainer(
        tmp_path,
        max_steps=20,  # of two batches each, in four epochs
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=[bar],
        enable_progress_bar=True,
    )
    fit.fit(ReLUSAE(4, 6, decoder_norm="free"), datamodule=Counted())
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("  ") for line in lines if line.startswith("step")]
    assert len(shown) == len(lines)  # and no bar
    assert [line[0] for line in shown] == [f"step {step}/20" for step in range(2, 21, 2)]
    assert all({"loss", "l0", "dead"} <= {cell.split()[0] for cell in line} for line in shown)
    assert SAEProgressBar(refresh_rate=0).writes_lines is False


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    bar = SAEProgressBar()
    assert bar.is_enabled
    assert not bar.writes_lines


def test_sae_is_exported_at_the_end_beside_an_earlier_one(tmp_path: Path) -> None:
    for name in ("sae", "sae-2"):
        export = ExportSAE()
        fit = trainer(tmp_path, max_steps=2, callbacks=[export])
        fit.fit(ReLUSAE(4, 6, decoder_norm="free"), datamodule=Counted())
        assert export.folder == tmp_path / name
        assert (tmp_path / name / "sae.safetensors").is_file()


def test_without_a_language_model_the_test_metrics_are_written(tmp_path: Path) -> None:
    evaluation = HeldOutEvaluation()
    trainer(tmp_path, callbacks=[evaluation]).test(
        ReLUSAE(4, 6), datamodule=Counted(), verbose=False
    )
    assert evaluation.path == tmp_path / "results.json"
    assert "l0" in evaluation.results
    assert "ce_clean" not in evaluation.results


def test_unused_counts_up(tmp_path: Path) -> None:
    assert unused(tmp_path / "a.json").name == "a.json"
    (tmp_path / "a.json").touch()
    (tmp_path / "a-2.json").touch()
    assert unused(tmp_path / "a.json").name == "a-3.json"


def test_number_of_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`n_tokens` to be positive but got 0"):
        HeldOutEvaluation(0)
