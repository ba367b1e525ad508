"""The study as a command: what it writes, what it says, what it refuses."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae.cli import command
from lightning_sae.studies import main
from lightning_sae.studies.broken_latents import overhead
from lightning_sae.studies.broken_latents.report import cost_in_words
from lightning_sae.studies.broken_latents.study import broken_latents
from lightning_sae.studies.broken_latents.train import ExperimentRun, train

PICTURES = ("activations", "cosines", "firings")


@pytest.fixture(scope="module", autouse=True)
def brief_timing() -> Iterator[None]:
    """Measure Lightning's share on a few steps, since no test here depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead, "UNTIMED", 2)
        module = sys.modules[broken_latents.__module__]
        patch.setattr(module, "overhead", partial(overhead.overhead, steps=3, rounds=1))
        yield


def study(output: Path, *arguments: str) -> None:
    few = ["--samples", "3072", "--workers", "1"]
    main(["broken-latents", "--output", str(output), *few, *arguments])


def test_lightning_sae_study_runs_it_and_ends_bad_input_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lightning-sae", "study", "broken-latents", "--experiments=7", "--workers=1"]
    words += ["--seeds=1", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", [*words, "--samples=2048"])
    command()
    assert capsys.readouterr().out.splitlines()[-1].startswith("Made: ")
    assert (tmp_path / "out" / "report.html").is_file()
    monkeypatch.setattr(sys, "argv", [*words, "--samples=1024"])
    with pytest.raises(SystemExit, match=r"ValueError: .*`output` .* with another `samples`"):
        command()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experiments 4, with the auxiliary loss, and 7, with a single latent, of three steps each."""
    folder = tmp_path_factory.mktemp("study") / "new" / "folder"
    study(folder, "--experiments", "4,7", "--seeds", "1")
    return folder


@pytest.fixture
def results(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "results.json").read_text())["runs"]


def test_each_sae_of_each_experiment_has_a_result(results: list[dict[str, Any]]) -> None:
    assert [(r["experiment"], r["variant"], r["seed"], r["samples"]) for r in results] == [
        (4, "tied", 0, 3072),
        (4, "tied + auxiliary loss", 0, 3072),
        (7, "untied", 0, 3072),
        (7, "tied", 0, 3072),
    ]


def test_what_is_said_of_latents_follows_from_the_cosines(results: list[dict[str, Any]]) -> None:
    for result in results:
        cosines = torch.tensor(result["decoder_cosines"]).abs()
        assert result["feature"] == cosines.argmax(1).tolist()
        assert result["max_abs_cosine"] == pytest.approx(cosines.amax(1).tolist())
        assert len(result["peaks"]) == len(result["alive"]) == len(cosines)
        assert set(result["matched_features"]) <= set(result["feature"])


def test_a_verdict_has_the_documents_words_and_every_check(results: list[dict[str, Any]]) -> None:
    verdict = results[0]["verdict"]
    assert verdict["reported"].startswith("The latents of features 5 and 7 have feature 12")
    assert len(verdict["checks"]) == 3
    assert verdict["met"] is all(check["met"] for check in verdict["checks"])


def test_the_share_of_lightning_is_written_and_printed(output: Path) -> None:
    step = json.loads((output / "results.json").read_text())["step"]
    assert cost_in_words(step) in (output / "report.html").read_text(encoding="utf-8").replace(
        "&#39;", "'"
    )
    assert step["share_of_lightning"] == pytest.approx(
        1 - step["plain_microseconds"] / step["trainer_microseconds"], abs=0.01
    )


def test_each_sae_leaves_its_own_result(output: Path, results: list[dict[str, Any]]) -> None:
    for result in results:
        folder = (output / result["pictures"]["cosines"]).parent
        assert json.loads((folder / "result.json").read_text()) == result


def test_each_sae_has_its_pictures(output: Path, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert sorted(result["pictures"]) == list(PICTURES)
        for path in result["pictures"].values():
            assert (output / path).read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_other_file(output: Path) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 4 * len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(href="[^#]|https?://|<script|@import|url\()', page)


def test_the_page_has_each_expectation_and_its_count(
    output: Path, results: list[dict[str, Any]]
) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    for result in results:
        for check in result["verdict"]["checks"]:
            words = check["expected"].replace(">", "&gt;").replace("'", "&#39;")
            assert f"{int(check['met'])} of 1: {words}" in page


def test_the_command_ends_with_what_was_seen_and_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path / "out", "--experiments", "7", "--seeds", "2")
    said = capsys.readouterr().out
    assert "7. A single latent" in said
    assert "of 2: one latent has features 0, 1 and 2 in it, not 3" in said
    assert "untied, seed 1  " in said
    assert re.search(r"Made: \S+results.json, \S+report.html, and the pictures of 4 SAEs", said)


def test_a_study_that_was_stopped_trains_what_is_missing(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(output, tmp_path / "again")
    before = json.loads((output / "results.json").read_text())["runs"]
    shutil.rmtree(tmp_path / "again" / "7-tied-seed-0")
    module, trained = sys.modules[broken_latents.__module__], []

    def noted(run: ExperimentRun, report: Any) -> Any:
        trained.append(run.name)
        return train(run, report)

    monkeypatch.setattr(module, "train", noted)
    study(tmp_path / "again", "--experiments", "4,7", "--seeds", "1")
    assert trained == ["7-tied-seed-0"]
    again = json.loads((tmp_path / "again" / "results.json").read_text())["runs"]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in before]


@pytest.mark.parametrize("experiments", ["10", "", "1,1", "4;5", "one"])
def test_unknown_and_repeated_experiments_are_refused(tmp_path: Path, experiments: str) -> None:
    with pytest.raises(ValueError, match="`experiments` to be different numbers of 1, 2"):
        broken_latents(experiments, output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["samples", "seeds", "workers"])
def test_sizes_below_one_are_refused(tmp_path: Path, argument: str) -> None:
    none: dict[str, Any] = {argument: 0}
    with pytest.raises(ValueError, match=f"`{argument}` to be positive but got 0"):
        broken_latents(output=str(tmp_path / "out"), **none)


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` to be a new or empty folder"):
        broken_latents("7", samples=1024, seeds=1, output=str(tmp_path))
    with pytest.raises(ValueError, match=r"`output` to be a new or empty folder"):
        broken_latents("7", samples=1024, seeds=1, output=str(tmp_path / "note.txt"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "cwd"] == ["note.txt"]
