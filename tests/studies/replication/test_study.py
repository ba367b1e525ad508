"""The study of replication: from the command to the answers."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import ReLUSAE, load
from lightning_sae.studies import main
from lightning_sae.studies.replication import measure, study
from lightning_sae.studies.replication.report import across_seeds
from lightning_sae.studies.replication.settings import (
    CONSTRAINED,
    LOSS_SQUARED,
    OUT,
    PLAIN,
    PRUNED,
    REINITIALIZE,
)
from lightning_sae.studies.shared.snapshots import read_snapshots

SEEDS, STEPS = 2, 20
# So large a coefficient that some latents die in so few steps.
OWN = ["--l1_coefficient=40", "--out_l1_coefficient=1", "--lr=0.02", "--d_sae=24"]
OWN += [f"--steps={STEPS}"]


def words_without(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith(("--steps", "--d_sae"))]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: Sequence[str]) -> Path:
    folder = tmp_path_factory.mktemp("replication") / "new"
    arguments = [*words_without(words), *OWN, f"--seeds={SEEDS}"]
    main(["replication", f"--output={folder}", *arguments])
    return folder


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_every_member_has_figures_in_each_seed(output: Path, results: dict[str, Any]) -> None:
    names = {PLAIN, REINITIALIZE, LOSS_SQUARED, OUT, CONSTRAINED, PRUNED}
    assert [set(each["figures"]) for each in results["seeds"]] == [names] * SEEDS
    rows = list(csv.DictReader((output / "members.csv").read_text().splitlines()))
    assert {(row["seed"], row["sae"]) for row in rows} == {
        (str(seed), name) for seed in range(SEEDS) for name in names
    }
    for row in rows:
        zero, mean, clean = (
            float(row[name]) for name in ("ce_zero_ablation", "ce_mean_ablation", "ce_clean")
        )
        found = float(row["mean_ablation_recovers"])
        assert found == pytest.approx((zero - mean) / (zero - clean))


def test_frequencies_are_counted_on_all_training_activations(output: Path) -> None:
    for name in (PLAIN, OUT, CONSTRAINED):
        found = read_snapshots(output / "seed-0" / "frequencies" / f"{name}.safetensors")
        assert found.steps.tolist() == list(range(1, STEPS + 1))
        assert found.n.tolist() == [64] * STEPS
        assert found.counts.shape == (STEPS, 24)
        assert found.counts[0].sum() > 0


def test_members_differ_by_resampling_alone(output: Path) -> None:
    counts = {
        name: read_snapshots(output / "seed-0" / "frequencies" / f"{name}.safetensors").counts
        for name in (PLAIN, REINITIALIZE, LOSS_SQUARED)
    }
    first = int(0.15 * STEPS)
    for name in (REINITIALIZE, LOSS_SQUARED):
        assert torch.equal(counts[name][:first], counts[PLAIN][:first])
    # The MLP's output has another width and coefficient.
    saes = {name: load(output / "seed-0" / "saes" / name) for name in (PLAIN, OUT)}
    assert (saes[PLAIN].d_in, saes[OUT].d_in) == (512, 128)
    assert saes[OUT].source["hook_name"] == "blocks.1.hook_mlp_out"
    for sae in saes.values():
        assert sae.W_dec.norm(dim=1).tolist() == pytest.approx([1.0] * 24)


def test_the_constrained_sae_has_no_part_in_the_rare_direction(output: Path) -> None:
    for seed in range(SEEDS):
        folder = output / f"seed-{seed}"
        plain, constrained = (
            load(folder / "saes" / PLAIN),
            load(folder / CONSTRAINED / "saes" / CONSTRAINED),
        )
        found = read_snapshots(folder / "frequencies" / f"{PLAIN}.safetensors")
        rare = found.counts[-5:].sum(0) < 1e-4 * found.n[-5:].sum()
        assert rare.any()
        mean = plain.W_enc.T[rare].mean(0)
        direction = mean / mean.norm()
        assert plain.W_enc.T[rare].matmul(direction).abs().max() > 1e-2
        for rows in (constrained.W_enc.T, constrained.W_dec):
            assert rows.matmul(direction).abs().max() < 1e-4 * rows.norm(dim=1).max()


def test_shares_of_latents_are_those_of_the_last_windows(
    output: Path, results: dict[str, Any]
) -> None:
    for name, found in results["seeds"][1]["latents"].items():
        snapshots = read_snapshots(output / "seed-1" / "frequencies" / f"{name}.safetensors")
        counts, n = snapshots.counts[-5:].sum(0), float(snapshots.n[-5:].sum())
        assert found["activations_counted"] == n
        assert found["never"] == pytest.approx(sum(c == 0 for c in counts.tolist()) / 24)
        assert found["below_1e-4"] == pytest.approx(sum(c / n < 1e-4 for c in counts.tolist()) / 24)


def test_without_its_rare_latents_an_sae_keeps_its_code_and_loses_their_part() -> None:
    sae = ReLUSAE(6, 4)
    x, gone = torch.randn(5, 6), torch.tensor([True, False, False, True])
    without = measure.without_latents(sae, gone)
    torch.testing.assert_close(without.encode(x), sae.encode(x))
    expected = sae.decode(sae.encode(x) * ~gone)
    torch.testing.assert_close(without(x), expected)
    assert sae.W_dec.norm(dim=1).min() > 0.5  # the original is as it was


def test_directions_of_seeds_are_compared_where_there_are_rare_latents() -> None:
    def seed(direction: list[float], rare: bool) -> dict[str, Any]:
        return {"per_latent": {PLAIN: {"rare_direction": direction, "rare": [False, rare]}}}

    results = [seed([1.0, 0.0], True), seed([0.6, 0.8], True), seed([0.0, 0.0], False)]
    assert across_seeds(results, PLAIN) == pytest.approx([0.6])
    assert across_seeds(results, CONSTRAINED) == []


def test_a_finished_study_trains_and_measures_nothing(
    output: Path,
    words: Sequence[str],
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("lightning_sae.studies.shared.training._fit", refuse)
    monkeypatch.setattr(study, "measure", refuse)
    arguments = [*words_without(words), *OWN, f"--seeds={SEEDS}"]
    main(["replication", f"--output={output}", *arguments])
    assert json.loads((output / "results.json").read_text()) == results
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"Made: {output}/results.json")


def test_a_study_broken_off_in_the_second_stage_goes_on_there(
    output: Path, words: Sequence[str], results: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(output, folder)
    for gone in ("constrained", "figures.json", "evaluation.json"):
        path = folder / "seed-1" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    arguments = [*words_without(words), *OWN, f"--seeds={SEEDS}"]
    main(["replication", f"--output={folder}", *arguments])
    again = json.loads((folder / "results.json").read_text())
    assert again["seeds"] == results["seeds"]


def test_report_has_question_comparison_and_pictures(output: Path) -> None:
    page = (output / "report.html").read_text()
    for text in ("ultra-rare latents", "97.5 %", "data:image/png", "hook_mlp_out"):
        assert text in page
    assert "http" not in page
    for name in ("over_time.png", "shares.png", "frequencies.png", "cosines.png"):
        assert (output / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hook_name=blocks.1.hook_resid_post", "`hook_name` to end in `.mlp.hook_post`"),
        ("--l1_coefficient=0", "l1_coefficient"),
        ("--steps=4", "`steps` to be at least 7"),
    ],
)
def test_what_cannot_be_is_refused(
    argument: str, message: str, words: Sequence[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["replication", f"--output={tmp_path / 'a'}", *words_without(words), argument])
    assert not (tmp_path / "a").exists()
