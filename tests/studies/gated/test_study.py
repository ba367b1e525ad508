"""The study of gating: from the command to the answers."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_sae import load
from lightning_sae.studies import main
from lightning_sae.studies.gated import study
from lightning_sae.studies.gated.report import equal_loss, in_words
from lightning_sae.studies.gated.study import against_baseline
from lightning_sae.studies.shared import sweep as sweeps
from lightning_sae.studies.shared import tuning
from lightning_sae.studies.shared.sweep import Swept
from lightning_sae.studies.shared.tuning import Tuned

SEEDS = 2
COEFFICIENTS = '{"relu": [0.1, 3], "gated": [3, 0.1], "gated-norms": [0.1, 3]}'
OWN = (
    "--families=gated,relu,gated-norms",
    f"--coefficients={COEFFICIENTS}",
    "--learning_rates=[1e-2,1e-3]",
    "--tuning_steps=4",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("gated") / "new"
    main(["gated", f"--output={folder}", *words, *OWN, f"--seeds={SEEDS}"])
    return folder


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_every_sae_of_the_sweep_has_its_row(output: Path, results: dict[str, Any]) -> None:
    found = [(row["seed"], row["family"], row["coefficient"]) for row in results["saes"]]
    names = ("relu", "gated", "gated-norms")
    assert found == [(s, name, c) for s in range(SEEDS) for name in names for c in (0.1, 3.0)]
    table = list(csv.DictReader((output / "results.csv").read_text().splitlines()))
    assert [float(row["l0"]) for row in table] == [row["l0"] for row in results["saes"]]
    assert all(math.isfinite(row["loss_recovered_mean"]) for row in results["saes"])


def test_all_seeds_are_evaluated_on_the_same_text(results: dict[str, Any]) -> None:
    for name in ("ce_clean", "ce_mean_ablation"):
        assert len({row[name] for row in results["saes"]}) == 1


def test_members_are_what_their_family_says(output: Path) -> None:
    free = load(output / "seed-1" / "saes" / "gated-norms-3.0")
    unit = load(output / "seed-1" / "saes" / "gated-3.0")
    assert (type(free).__name__, free.decoder_norm) == ("GatedSAE", "free")
    assert (type(unit).__name__, unit.decoder_norm) == ("GatedSAE", "unit")
    assert unit.l1_coefficient == 3.0
    assert unit.W_dec.norm(dim=1).tolist() == pytest.approx([1.0] * 24)
    assert free.W_dec.norm(dim=1).tolist() != pytest.approx([1.0] * 24)


def test_each_family_has_the_rate_of_its_least_held_out_objective(
    results: dict[str, Any],
) -> None:
    for name, tried in results["tuning"].items():
        best = min(tried["objective"], key=tried["objective"].get)
        assert tried["chosen"] == float(best)
        assert {row["lr"] for row in results["saes"] if row["family"] == name} == {float(best)}


def test_report_has_question_answer_picture_and_settings(output: Path) -> None:
    page = (output / "report.html").read_text()
    for words in ("fewer latents", "about one half", "data:image/png;base64,", "context_length 16"):
        assert words in page
    assert "http" not in page
    assert (output / "gated.png").stat().st_size > 10_000


def test_a_finished_study_trains_nothing_and_says_the_same(
    output: Path,
    words: list[str],
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained or evaluated again")

    monkeypatch.setattr("lightning_sae.studies.shared.training._fit", refuse)
    monkeypatch.setattr("lightning_sae.studies.shared.evaluation.held_out_figures", refuse)
    main(["gated", f"--output={output}", *words, *OWN, f"--seeds={SEEDS}"])
    assert json.loads((output / "results.json").read_text()) == results
    said = capsys.readouterr().out.splitlines()
    assert "L0 at equal loss, baseline = 1" in " ".join(said)
    assert said[-1].startswith("Made: ")
    for name in ("results.json", "results.csv", "gated.png", "report.html"):
        assert str(output / name) in said[-1]


def test_a_study_that_was_killed_evaluates_what_is_left(
    output: Path, words: list[str], results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightning_sae.studies.shared.training._fit", lambda *_: pytest.fail("trained again")
    )
    (output / "seed-1" / "evaluation.json").unlink()
    before = (output / "seed-0" / "evaluation.json").stat().st_mtime_ns
    main(["gated", f"--output={output}", *words, *OWN, f"--seeds={SEEDS}"])
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "seed-0" / "evaluation.json").stat().st_mtime_ns == before


def test_a_file_says_what_arguments_say(tmp_path: Path, output: Path, words: list[str]) -> None:
    import yaml

    given = dict(word.removeprefix("--").split("=", 1) for word in (*words, *OWN))
    settings = {name: yaml.safe_load(value) for name, value in given.items()}
    settings["learning_rates"] = [1e-2, 1e-3]  # 1e-2 is a word to YAML
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    # With another value the folder would be refused.
    main(["gated", f"--config={tmp_path / 'study.yaml'}", f"--output={output}", "--seeds=1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--families=gated,rescale-shift"], "`families` to be `relu` and different ones of gated"),
        (["--families=relu,relu"], "`families` to be `relu` and different ones"),
        (["--families=relu,topk"], "`families` to be `relu` and different ones"),
        (["--families=relu"], "`families` to be `relu` and different ones"),
        (["--families=relu,gated", '--coefficients={"topk": [1, 2]}'], "got some for topk"),
        (['--coefficients={"relu": [1]}'], "two different positive numbers for `relu` but got"),
        (['--coefficients={"gated": [1, 1]}'], "positive numbers for `gated` but got"),
        (['--coefficients={"gated": [1, -1]}'], "positive numbers for `gated` but got"),
        (["--learning_rates=[]"], "`learning_rates` to be different positive numbers"),
        (["--learning_rates=[1e-3,0]"], "`learning_rates` to be different positive numbers"),
        (["--learning_rates=[1e-3,1e-3]"], "`learning_rates` to be different positive numbers"),
        (["--tuning_steps=0"], "`tuning_steps`"),
        (["--steps=0"], "`steps`"),
        (["--hook_name=blocks.9.hook_resid_post"], r"blocks\.9\.hook_resid_post"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_made(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["gated", f"--output={tmp_path / 'new'}", *words])
    assert not (tmp_path / "new").exists()


# The answers, from figures that are known.


def of_known_figures(halved: float, gamma: float, seeds: int = 2) -> Swept:
    """Gated needs `halved` of the L0 that ReLU does, whose loss recovered is log10 of L0."""
    families = study.FAMILIES[:2]
    rows = [
        {
            "family": family.name,
            "coefficient": coefficient,
            "seed": seed,
            "l0": share * 10**i,
            "loss_recovered_mean": float(i),
            "relative_reconstruction_bias": bias,
        }
        for seed in range(seeds)
        for family, share, bias in zip(families, (1.0, halved), (0.8, gamma), strict=True)
        for i, coefficient in enumerate(family.coefficients[:3])
    ]
    return Swept(families, seeds, Tuned({}, {}), rows)


def test_a_family_with_half_the_l0_at_every_level_needs_half() -> None:
    answers = against_baseline(of_known_figures(0.5, 0.99), study.FAMILIES[1])
    assert answers["l0_ratio"] == pytest.approx([0.5, 0.5])
    assert answers["gamma"] == pytest.approx([0.99, 0.99])
    assert answers["gamma_of_baseline"] == pytest.approx([0.8, 0.8])
    words = in_words("Gated", answers)
    assert words.startswith("Gated needs 0.50 of the baseline's L0")
    assert words.endswith("less in every repetition.")


def test_the_baseline_against_itself_needs_all() -> None:
    swept = of_known_figures(0.5, 0.99)
    assert against_baseline(swept, swept.families[0])["l0_ratio"] == pytest.approx([1.0, 1.0])


def test_curves_without_a_common_range_are_not_compared() -> None:
    swept = of_known_figures(0.5, 0.99)
    apart = [
        {**row, "l0": row["l0"] * 1e6, "loss_recovered_mean": row["loss_recovered_mean"] + 10}
        if row["family"] == "gated"
        else row
        for row in swept.rows
    ]
    swept = Swept(swept.families, 2, swept.tuned, apart)
    answers = against_baseline(swept, swept.families[1])
    assert all(values == [None, None] for values in answers.values())
    assert "no loss recovered that both" in in_words("Gated", answers)
    assert sweeps.over_seeds(answers["l0_ratio"]) == "no common range"


def test_words_follow_the_numbers() -> None:
    def said(*ratios: float | None) -> str:
        return in_words("A", {"l0_ratio": list(ratios)})

    assert said(1.5, 1.7) == (
        "A needs 1.60 of the baseline's L0 for the same loss recovered: more in every repetition."
    )
    assert said(0.5, 1.5).endswith(
        "1.00 of the baseline's L0 for the same loss recovered: less or more by repetition."
    )
    assert said(None, 0.5).startswith("A needs 0.50")


def test_l0_at_equal_levels_is_that_of_the_curves() -> None:
    table = equal_loss(of_known_figures(0.5, 0.99), n_levels=3)
    assert table is not None
    assert [row[0] for row in table.rows] == ["0.000", "1.000", "2.000"]
    assert [row[1] for row in table.rows] == ["1.0 ± 0.0", "10.0 ± 0.0", "100.0 ± 0.0"]
    assert [row[2] for row in table.rows] == ["0.5 ± 0.0", "5.0 ± 0.0", "50.0 ± 0.0"]


def test_a_family_that_diverges_at_every_rate_is_named() -> None:
    tried = Tuned({"gated": {1.0: None, 2.0: None}}, {"gated": 1.0})
    with pytest.raises(ValueError, match="`gated` trains but .* any of 1.0, 2.0: give smaller"):
        _ = tried.chosen


def test_rates_at_the_edge_of_the_grid_are_said_to_be() -> None:
    tried: Any = {"a": {1.0: 3.0, 2.0: 1.0, 3.0: 2.0}, "b": {1.0: 1.0, 2.0: 2.0, 3.0: None}}
    table = tuning.Tuned(tried, {"a": 1.0, "b": 1.0}).section({"a": "A", "b": "B"}).tables[0]
    assert table.rows[1] == ["B", "1", "1.000", "2.000", "diverged", "1"]
    assert table.note.endswith("At an edge of the grid: B.")
