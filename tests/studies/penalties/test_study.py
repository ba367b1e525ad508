"""The study of penalties: from the command to the answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sae import load
from lightning_sae.studies import main
from lightning_sae.studies.penalties import study
from lightning_sae.studies.penalties.report import below, left
from lightning_sae.studies.penalties.study import against_l1
from lightning_sae.studies.shared.frontier import Curve, gap, gap_at_low_l0
from lightning_sae.studies.shared.sweep import Swept
from lightning_sae.studies.shared.tuning import Tuned

OWN = (
    "--penalties=l1,tanh,sqrt",
    '--coefficients={"l1": [0.1, 3], "sqrt": [0.1, 3]}',
    "--learning_rates=[0.01]",
    "--tuning_steps=2",
    "--seeds=1",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("penalties") / "new"
    main(["penalties", f"--output={folder}", *words, *OWN])
    return folder


def test_members_have_their_penalty_and_coefficient(output: Path) -> None:
    rows = json.loads((output / "results.json").read_text())["saes"]
    tanh = study.FAMILIES[3].coefficients
    expected = [("l1", 0.1), ("l1", 3.0), ("sqrt", 0.1), ("sqrt", 3.0)]
    expected += [("tanh", coefficient) for coefficient in tanh]
    assert [(row["family"], row["coefficient"]) for row in rows] == expected
    for name, coefficient in expected:
        sae: Any = load(output / "seed-0" / "saes" / f"{name}-{coefficient}")
        assert type(sae.penalty).__name__.lower() == name
        assert (sae.l1_coefficient, sae.decoder_norm) == (coefficient, "unit")


def test_report_answers_the_question(output: Path) -> None:
    page = (output / "report.html").read_text()
    for words in ("below and left of L1", "CE against L0 of sqrt", "data:image/png;base64,"):
        assert words in page
    answers = json.loads((output / "results.json").read_text())["answers"]
    assert set(answers) == {"sqrt", "tanh"}
    assert all(len(values) == 1 for values in answers["sqrt"].values())


def test_a_penalty_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`penalties` to be `l1` and different ones of sqrt, log"):
        main(["penalties", f"--output={tmp_path / 'new'}", "--penalties=l1,l0"])


# The answers, from figures that are known.

E = 2.718281828459045


def swept(offset: float, shift: float = 1.0) -> Swept:
    """Costs of L1 fall with log L0 from 3 to 1; those of sqrt are less by `offset`."""
    families = study.FAMILIES[:2]
    rows: list[dict[str, Any]] = []
    for family, less, times in zip(families, (0.0, offset), (1.0, shift), strict=True):
        for i, coefficient in enumerate(family.coefficients[:3]):
            cost = 3 - i - less
            rows.append(
                {
                    "family": family.name,
                    "coefficient": coefficient,
                    "seed": 0,
                    "l0": times * E**i,
                    "ce_spliced": cost,
                    "mse": 10 * cost,
                    "loss_recovered_mean": -cost,
                    "explained_variance": -cost,
                    "relative_reconstruction_bias": 0.8 + less / 10,
                }
            )
    return Swept(families, 1, Tuned({}, {}), rows)


def test_a_curve_that_is_lower_by_a_constant_has_that_distance() -> None:
    answers = against_l1(swept(offset=0.5), study.FAMILIES[1])
    expected = {
        "area_ce_spliced": -1.0,  # two e-folds
        "gap_ce_spliced": -0.5,
        "gap_low_ce_spliced": -0.5,
        "below_ce_spliced": 1.0,
        "l0_ratio_ce_spliced": E**-0.5,
        "area_mse": -10.0,
        "gap_mse": -5.0,
        "gap_low_mse": -5.0,
        "below_mse": 1.0,
        "l0_ratio_mse": E**-0.5,
        "gap_gamma": 0.05,
    }
    assert {name: values[0] for name, values in answers.items()} == pytest.approx(expected)


def test_without_a_common_range_there_is_no_answer() -> None:
    apart = swept(offset=10, shift=100)
    assert all(values == [None] for values in against_l1(apart, apart.families[1]).values())


def test_the_lower_half_of_the_range_is_judged_alone() -> None:
    baseline = Curve((0.0, 4.0), (0.0, 0.0))
    lower_first = Curve((0.0, 2.0, 4.0), (-2.0, 0.0, 2.0))
    assert gap(lower_first, baseline) == pytest.approx(0)
    assert gap_at_low_l0(lower_first, baseline) == pytest.approx(-1)


def test_words_follow_the_numbers() -> None:
    assert below([1.0, 1.0]) == "below that of L1 throughout the common range of L0"
    assert below([0.0]) == "below that of L1 nowhere in the common range of L0"
    assert below([0.5, 1.0, None]) == "below that of L1 in 75% of the common range of log L0"
    assert below([None]) == "at no L0 that both have"
    assert left([0.5, 0.7]).endswith("0.60 of the L0, less in every repetition")
    assert left([1.5, 1.7]).endswith("1.60 of the L0, more in every repetition")
    assert left([0.5, 1.5]).endswith("1.00 of the L0, less or more by repetition")
    assert left([None]) == "and no level is reached by both"
