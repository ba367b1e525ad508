"""The study of low activations: from the command to the answers, and each figure by itself."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import SideBySide, load
from lightning_sae.analysis import evaluate_in_model
from lightning_sae.functional.penalties import L1, Sqrt
from lightning_sae.studies import main
from lightning_sae.studies.low_activations import measure as measuring
from lightning_sae.studies.low_activations import study
from lightning_sae.studies.low_activations.costs import (
    at_levels,
    first_places,
    frontier,
    halving,
    mean_rises,
    nearest,
    value_at,
)
from lightning_sae.studies.low_activations.measure import WAYS, firings_of, measure, removals
from lightning_sae.studies.low_activations.report import kind_in_words
from lightning_sae.studies.low_activations.train import families_of, members_of
from lightning_sae.studies.shared.evaluation import held_out_figures
from lightning_sae.studies.shared.setting import Setting

SEEDS = 2
SHARES = (0.25, 0.6)
OWN = ("--coefficients=[0.5,2]", "--calibration_tokens=1024", f"--shares={list(SHARES)}")
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: Sequence[str]) -> Path:
    folder = tmp_path_factory.mktemp("low") / "new"
    main(["low-activations", f"--output={folder}", *words, *OWN, f"--seeds={SEEDS}"])
    return folder


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


@pytest.fixture
def setting(small: dict[str, Any], tmp_path: Path) -> Setting:
    return Setting(tmp_path / "setting", HOOK, **small)


# The command.


def test_every_sae_way_and_share_is_measured_once(results: dict[str, Any]) -> None:
    assert len(results["seeds"]) == SEEDS
    for each in results["seeds"]:
        found = [(point["sae"], point["way"], point["share"]) for point in each["points"]]
        assert len(set(found)) == len(found)
        saes = ("l1-0.5", "l1-2")
        ways = [way for way in WAYS if way != "lowest_k"]  # some k may be two shares' nearest
        expected = {(sae, way, share) for sae in saes for way in ways for share in SHARES}
        assert expected | {(sae, "whole", 0.0) for sae in saes} <= set(found)
        assert all(math.isfinite(p[name]) for p in each["points"] for name in ("ce", "kl", "fvu"))
        for point in each["points"]:
            whole = next(p for p in each["points"] if p["sae"] == point["sae"])
            assert point["l0"] <= whole["l0"]
            left = 1 - point["share"]
            assert point["l0"] / whole["l0"] == pytest.approx(left, abs=0.15)


def test_tables_have_the_rows_of_the_results(output: Path, results: dict[str, Any]) -> None:
    rows = list(csv.DictReader((output / "halving.csv").read_text().splitlines()))
    assert [row["way"] for row in rows] == [row["way"] for row in results["halving"]]
    assert len(rows) == SEEDS * 2 * len(WAYS)
    points = list(csv.DictReader((output / "points.csv").read_text().splitlines()))
    assert len(points) == sum(len(each["points"]) for each in results["seeds"])
    pairs = {(row["removed_from"], row["trained"]) for row in results["frontier"]}
    assert pairs <= {("l1-0.5", "l1-2"), ("l1-2", "l1-0.5")}


def test_report_has_question_comparison_pictures_and_settings(output: Path) -> None:
    page = (output / "report.html").read_text()
    for text in (
        "What does it cost to remove",
        "about 0.08",
        "data:image/png",
        "shares [0.25, 0.6]",
    ):
        assert text in page
    assert "http" not in page
    for name in ("removal.png", "frontier.png"):
        assert (output / name).stat().st_size > 10_000


def test_a_finished_study_trains_and_measures_nothing(
    output: Path,
    words: Sequence[str],
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(study, "measure", refuse)
    monkeypatch.setattr(study, "firings_of", refuse)
    monkeypatch.setattr("lightning_sae.studies.shared.training._fit", refuse)
    main(["low-activations", f"--output={output}", *words, *OWN, f"--seeds={SEEDS}"])
    assert json.loads((output / "results.json").read_text()) == results
    said = capsys.readouterr().out
    assert "Cross-entropy paid to halve L0" in said
    assert said.splitlines()[-1].startswith(f"Made: {output}/results.json")


def test_given_saes_are_taken_in_place_of_training(
    output: Path,
    words: Sequence[str],
    results: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "train_together", None)
    given = [str(output / "seed-0" / "saes" / "l1-2")]
    folder = tmp_path / "given"
    main(["low-activations", f"--output={folder}", *words, *OWN, f"--sae={json.dumps(given)}"])
    points = json.loads((folder / "results.json").read_text())["seeds"][0]["points"]
    assert points == [p for p in results["seeds"][0]["points"] if p["sae"] == "l1-2"]


def test_each_kind_is_trained_at_its_values_and_lengths(setting: Setting) -> None:
    families = families_of({"l1": [0.5, 2.0], "sqrt": [1.0], "gated": [3.0], "jumprelu": [4.0]})
    members = members_of(setting, families, 3)
    names = ["l1-0.5-x3", "l1-2-x3", "sqrt-1-x3", "gated-3-x3", "jumprelu-4-x3"]
    assert [member["name"] for member in members] == names
    built = SideBySide(members, d_in=8)
    assert [type(built[name].penalty) for name in names[:3]] == [L1, L1, Sqrt]
    assert [built[name].l1_coefficient for name in names[:4]] == [0.5, 2.0, 1.0, 3.0]
    assert built["jumprelu-4-x3"].target_l0 == 4.0
    warmups = [each["init_args"]["n_steps"] for each in members[0]["callbacks"][:1]]
    assert warmups == [int(0.1 * 3 * setting.steps)]
    assert "L1Warmup" not in str(members[-1]["callbacks"])  # a target steers itself


def test_saes_of_another_length_or_kind_are_not_compared(
    words: Sequence[str], tmp_path: Path
) -> None:
    kinds = ["--coefficients=[0.5,2]", "--gated_coefficients=[1]", "--lengths=[1,2]"]
    few = ["--ways=global", "--seeds=1", "--shares=[0.3,0.9]", "--calibration_tokens=512"]
    main(["low-activations", f"--output={tmp_path / 'a'}", *words, *kinds, *few])
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    (seed,) = found["seeds"]
    assert {point["way"] for point in seed["points"]} == {"whole", "global"}
    assert len(seed["points"]) == 6 * 3
    short, long = (
        load(tmp_path / "a" / "seed-0" / part) for part in ("saes/l1-2", "x2/saes/l1-2-x2")
    )
    assert long.n_trained == 2 * short.n_trained > 0
    for row in found["frontier"]:
        assert row["trained"].endswith("-x2") == row["removed_from"].endswith("-x2")
        assert row["trained"][:2] == row["removed_from"][:2]
    assert (tmp_path / "a" / "kinds.png").stat().st_size > 10_000


def test_an_sae_of_another_hook_is_refused(
    output: Path, words: Sequence[str], tmp_path: Path
) -> None:
    given = f"--sae={output / 'seed-0' / 'saes' / 'l1-2'}"
    hook = "--hook_name=blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match=f"l1-2 is one at {HOOK}, 128 wide"):
        main(["low-activations", f"--output={tmp_path / 'a'}", *words, given, hook])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--coefficients=[1,1]", "`coefficients` to be different numbers above 0"),
        ("--coefficients=[0]", "`coefficients` to be different numbers above 0"),
        ("--shares=[0.5,1]", "`shares` to be numbers above 0 and below 1"),
        ("--shares=[]", "`shares` to be numbers above 0 and below 1"),
        ("--calibration_tokens=0", "calibration_tokens"),
        ("--lengths=[1,1]", "`lengths` to be different numbers above 0"),
        ("--jumprelu_l0=[-1]", "`jumprelu_l0` to be different numbers above 0"),
        ("--ways=highest", "`ways` to be different ones of lowest_k"),
    ],
)
def test_what_cannot_be_is_refused(
    argument: str, message: str, words: Sequence[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["low-activations", f"--output={tmp_path / 'a'}", *words, argument])
    assert not (tmp_path / "a").exists()


# One pass.


def test_the_whole_sae_has_the_figures_of_its_evaluation(output: Path, setting: Setting) -> None:
    data, name = setting.data(), "l1-0.5"
    saes = {name: load(output / "seed-0" / "saes" / name)}
    ways = {name: removals(firings_of(saes, data, 512)[name], SHARES)}
    points, clean = measure(saes, ways, data, 1024)
    inside = evaluate_in_model(saes[name], data, 1024)
    outside = held_out_figures(saes, data, 1024)[name]
    whole = points[0]
    assert clean == pytest.approx(inside["ce_clean"])
    assert whole["ce"] == pytest.approx(inside["ce_spliced"], rel=1e-5)
    assert whole["kl"] == pytest.approx(inside["kl"], rel=1e-4)
    for figure in ("l0", "mse", "fvu"):
        assert whole[figure] == pytest.approx(outside[figure], rel=1e-5)


def test_each_variant_is_the_sae_with_that_code_in_the_model(
    output: Path, setting: Setting
) -> None:
    data, name = setting.data(), "l1-2"
    sae = load(output / "seed-0" / "saes" / name)
    ways = removals(firings_of({name: sae}, data, 512)[name], (0.5,))
    points, _ = measure({name: sae}, {name: ways}, data, 512)

    class Less(type(sae)):  # type: ignore[misc]
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            f = super().encode(x)
            return f * (f >= ways[-1].level)

    sae.__class__ = Less
    assert ways[-1].way == "global"
    assert points[-1]["ce"] == pytest.approx(evaluate_in_model(sae, data, 512)["ce_spliced"])


def test_the_model_reads_and_an_sae_encodes_each_block_once(
    output: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, name = setting.data(), "l1-2"
    sae = load(output / "seed-0" / "saes" / name)
    ways = {name: removals(firings_of({name: sae}, data, 512)[name], SHARES)}
    calls = {"block": 0, "encode": 0, "ranks": 0}
    encode, ranks, block = sae.encode, measuring.ranks_among_firing, measuring.Block

    def counted(key: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[key] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(sae, "encode", counted("encode", encode))
    monkeypatch.setattr(measuring, "ranks_among_firing", counted("ranks", ranks))
    monkeypatch.setattr(measuring, "Block", counted("block", block))
    points, _ = measure({name: sae}, ways, data, 2048)
    assert calls == dict.fromkeys(calls, len(list(data.held_out_tokens(2048))))
    assert len(points) >= 1 + 3 * len(SHARES)


def test_levels_are_measured_on_training_text(output: Path, setting: Setting) -> None:
    data, name = setting.data(), "l1-2"
    sae = load(output / "seed-0" / "saes" / name)
    found = firings_of({name: sae}, data, 1024)[name]
    tokens = data.training_blocks().read(1024 // data.context_length)
    activations = data.language_model.activations(tokens)
    f = sae.encode(activations[data.filter.kept(tokens, activations)])
    assert torch.equal(found.maxima, f.amax(0))
    assert len(found.per_token) == len(f)


# Answers.


def point(sae: str, way: str, share: float, l0: float, ce: float) -> dict[str, Any]:
    return {
        "sae": sae,
        "way": way,
        "share": share,
        "l0": l0,
        **{"ce": ce, "kl": 2 * ce, "mse": 3 * ce, "fvu": ce / 10},
    }


def straight(sae: str, l0: float, ce: float, slopes: Sequence[float]) -> list[dict[str, Any]]:
    """An SAE whose cross-entropy rises by `slope` for each halving of L0, way by way."""
    points = [point(sae, "whole", 0.0, l0, ce)]
    for way, slope in zip(WAYS, slopes, strict=True):
        points += [
            point(sae, way, 1 - 2.0**-power, l0 * 2.0**-power, ce + slope * power)
            for power in (0.4, 1.5)
        ]
    return points


def test_halving_costs_the_slope_of_curves_that_are_straight_over_log_l0() -> None:
    rows = halving(straight("a", 40.0, 3.0, (0.4, 0.3, 0.2, 0.1)))
    assert [row["way"] for row in rows] == list(WAYS)
    assert [row["ce_rise"] for row in rows] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [row["mse_rise"] for row in rows] == pytest.approx([1.2, 0.9, 0.6, 0.3])
    assert rows[0]["l0"] == 40.0


def test_levels_that_are_not_reached_give_none() -> None:
    rows = halving([point("a", "whole", 0.0, 8.0, 1.0), point("a", "global", 0.3, 5.0, 2.0)])
    assert [row["ce_rise"] for row in rows] == [None] * 4
    assert value_at([point("a", "whole", 0.0, 8.0, 1.0)], "ce", 8.0) is None
    assert first_places(rows) == dict.fromkeys(WAYS, 0)
    assert mean_rises(rows) == {}


def test_places_and_means_are_over_saes_that_all_ways_can_halve() -> None:
    first = halving(straight("a", 40.0, 3.0, (0.4, 0.3, 0.2, 0.1)))
    second = halving(straight("b", 20.0, 3.0, (0.1, 0.3, 0.2, 0.2)))
    rows = [row | {"seed": 0} for row in first + second]
    assert first_places(rows) == {"lowest_k": 1, "share_of_maximum": 0, "quantile": 0, "global": 1}
    rises = [0.25, 0.3, 0.2, 0.15]
    assert list(mean_rises(rows).values()) == pytest.approx(rises)
    rows[0]["ce_rise"] = None
    assert mean_rises(rows)["global"] == pytest.approx(0.2)


def test_a_sparse_sae_is_held_against_denser_ones_of_its_family_at_its_l0() -> None:
    slopes = (1.0, 1.0, 1.0, 0.2)
    points = [
        *straight("sparse", 20.0, 3.5, slopes),
        *straight("dense", 40.0, 3.0, slopes),
        *straight("other", 30.0, 1.0, slopes),
        *straight("far", 400.0, 1.0, slopes),
    ]
    families = {"sparse": "L1", "dense": "L1", "far": "L1", "other": "sqrt"}
    (row,) = frontier(points, families)
    assert (row["trained"], row["removed_from"]) == ("sparse", "dense")
    assert (row["l0"], row["ce"]) == (20.0, 3.5)
    assert row["ce_removed"] == pytest.approx(3.2)
    assert row["fvu_removed"] == pytest.approx(0.32)


def test_levels_are_read_off_the_sweep_and_off_the_lowest_curve_under_a_threshold() -> None:
    slopes = (1.0, 1.0, 1.0, 0.2)  # a threshold costs .2 nats for each halving
    points = [
        *straight("sparse", 8.0, 3.7, slopes),
        *straight("middle", 32.0, 3.4, slopes),
        *straight("dense", 64.0, 3.0, slopes),
    ]
    rows = at_levels(points, dict.fromkeys(("sparse", "middle", "dense"), "L1"))
    assert [row["l0"] for row in rows] == [8.0, 16.0, 32.0, 64.0]  # the sweep has no others
    assert [row["ce"] for row in rows] == pytest.approx([3.7, 3.55, 3.4, 3.0])
    # At 32 the dense one is better; at 16 only the middle one is measured, which
    # comes down to 32 / 2^1.5 = 11.3.
    assert [row["ce_removed"] for row in rows] == pytest.approx([3.7, 3.6, 3.2, 3.0])


def test_the_nearest_denser_sae_is_taken_and_its_gains_are_counted() -> None:
    rows = [
        {"seed": 0, "trained": "c", "removed_from": "a", "ce": 3.0, "ce_removed": 2.0},
        {"seed": 0, "trained": "c", "removed_from": "b", "ce": 3.0, "ce_removed": 2.9},
        {"seed": 1, "trained": "c", "removed_from": "b", "ce": 3.0, "ce_removed": 3.3},
    ]
    assert nearest(rows) == rows[1:]
    said = kind_in_words("L1", nearest(rows))
    assert "in 1 of 2 pairs, by -0.100 nats on average (-0.300 to +0.100" in said
