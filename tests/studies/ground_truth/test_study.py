"""The study of ground truth: its world, its figures, its table, and the command."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sae.callbacks import DecoderNormProjection, TargetL0
from lightning_sae.data import ToyDataModule
from lightning_sae.studies import main
from lightning_sae.studies.ground_truth import measure as measuring
from lightning_sae.studies.ground_truth import settings
from lightning_sae.studies.ground_truth import study as studying
from lightning_sae.studies.ground_truth.measure import held_out, measure
from lightning_sae.studies.ground_truth.report import standings
from lightning_sae.studies.ground_truth.settings import ARCHITECTURES, World
from lightning_sae.studies.ground_truth.train import ArchitectureRun

SMALL = ("--n_features", "8", "--d_in", "8", "--d_sae", "8", "--samples", "2000", "--workers", "1")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "HELD_OUT", 2 * measuring.CHUNK)


def study(folder: Path, *arguments: str) -> None:
    main(["ground-truth", "--output", str(folder), *SMALL, *arguments])


# The world.


def test_all_features_follow_zipfs_law_and_children_need_their_parents() -> None:
    world = World(32, 32)
    fires = world.data(0).sample(40_000, torch.Generator().manual_seed(0)).magnitudes > 0
    first, last = settings.PROBABILITIES
    exponent = torch.log(torch.tensor(first / last)) / torch.log(torch.tensor(32.0))
    expected = first * torch.arange(1, 33) ** -exponent
    torch.testing.assert_close(fires.float().mean(0), expected, atol=0.01, rtol=0.05)
    assert len(world.requires()) == 28
    for child, parent in world.requires().items():
        assert parent < child
        # A parent's magnitude is cut to nothing once in two thousand firings.
        assert fires[fires[:, child], parent].float().mean() > 0.99


def test_worlds_of_different_seeds_have_other_features() -> None:
    assert not torch.equal(World(8, 8).data(0).features, World(8, 8).data(1).features)
    assert torch.equal(World(8, 8).data(1).features, World(8, 8).data(1).features)


def test_rare_features_are_as_strong_as_asked() -> None:
    plain, strong = World(32, 32).data(0), World(32, 32, rare_magnitude=6.0).data(0)
    assert torch.equal(plain.magnitudes, torch.ones(32))
    expected = torch.arange(1, 33) ** (torch.log(torch.tensor(6.0)) / torch.log(torch.tensor(32.0)))
    torch.testing.assert_close(strong.magnitudes, expected)
    assert torch.equal(strong.features, plain.features)
    assert torch.equal(strong.probabilities, plain.probabilities)


def test_more_features_than_dimensions_lie_in_superposition() -> None:
    features = World(64, 32).data(0).features
    cosines = (features @ features.T).fill_diagonal_(0).abs()
    assert 0.1 < cosines.max() <= settings.MAX_COSINE


# Entrants.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_l0_is_set_or_steered_to(name: str) -> None:
    run = ArchitectureRun(name, 3, 0, World(16, 16), 16, 10_240)
    sae = run.sae()
    assert (sae.d_in, sae.d_sae, sae.lr) == (16, 16, settings.RECIPE["lr"])
    steering = [c.target for c in run.callbacks() if isinstance(c, TargetL0)]
    assert steering == ([3] if sae.coefficient_name else [])
    assert steering or sae.k == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoder_rows_are_kept_where_their_norm_is_to_be_one(name: str) -> None:
    run = ArchitectureRun(name, 3, 0, World(16, 16), 16, 10_240)
    kept = any(isinstance(c, DecoderNormProjection) for c in run.callbacks())
    sees_strength = name in ("relu", "sqrt", "tied", "gated", "rescale-shift")
    assert kept == (run.sae().decoder_norm == "unit") == sees_strength


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norms_can_be_the_same_for_all(name: str, norm: str) -> None:
    run = ArchitectureRun(name, 3, 0, World(16, 16), 16, 10_240, norm)
    kept = any(isinstance(c, DecoderNormProjection) for c in run.callbacks())
    assert (run.sae().decoder_norm, kept) == (norm, norm == "unit")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_that_may_have_any_norm_start_at_the_one_asked_for(name: str) -> None:
    run = ArchitectureRun(name, 3, 0, World(16, 16), 16, 10_240, None, 0.1)
    expected = 0.1 if run.norm_of_rows == "free" else 1.0
    torch.testing.assert_close(run.sae().W_dec.norm(dim=1), torch.full((16,), expected))


def test_norms_asked_for_are_those_of_the_study(tmp_path: Path) -> None:
    study(tmp_path / "free", "--l0", "2", "--seeds", "1", "--architectures", "topk")
    free = json.loads((tmp_path / "free" / "results.json").read_text())["runs"][0]
    arguments = ("--l0", "2", "--seeds", "1", "--architectures", "topk", "--decoder_norm", "unit")
    study(tmp_path / "unit", *arguments)
    unit = json.loads((tmp_path / "unit" / "results.json").read_text())
    assert unit["decoder_norm"] == "unit"
    assert unit["runs"][0]["mcc"] != free["mcc"]


def test_weights_follow_from_the_seed_and_chance_is_left_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return ArchitectureRun("relu", 3, seed, World(8, 8), 8, 1024).sae().W_dec

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


# Figures.


@pytest.fixture
def data() -> ToyDataModule:
    return World(8, 8).data(0)


def measured(data: ToyDataModule, scale: float = 1.0, silent: int = 0) -> dict[str, float]:
    """Figures of latents that are the features, in another order; the last ones never fire."""
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    W_dec = data.features[order]
    on = (torch.arange(8) < 8 - silent) * scale
    sae = SimpleNamespace(
        W_dec=W_dec,
        encode=lambda x: torch.where((f := x @ W_dec.T) > 1e-4, f, 0.0) * on,
        decode=lambda f: f @ W_dec,
    )
    return measure(sae, held_out(data), data.features, data.pairs)


def test_latents_that_are_the_features_have_perfect_figures(data: ToyDataModule) -> None:
    m = measured(data)
    for name, value in {"mcc": 1, "found": 1, "f1": 1, "shrinkage": 1, "fvu": 0, "dead": 0}.items():
        assert m[name] == pytest.approx(value, abs=1e-3), name
    assert m["l0"] == pytest.approx(m["true_l0"], rel=1e-3)
    assert m["true_l0"] == pytest.approx(sum(ZIPF_OF_EIGHT), rel=0.05)


ZIPF_OF_EIGHT = [0.4 * (i + 1) ** -1.77398 for i in range(8)]  # log(40) / log(8)


def test_halved_latents_shrink_and_are_right_otherwise(data: ToyDataModule) -> None:
    m = measured(data, scale=0.5)
    assert m["shrinkage"] == pytest.approx(0.5, abs=1e-3)
    assert m["relative_reconstruction_bias"] == pytest.approx(0.5, abs=1e-3)
    assert (m["mcc"], m["f1"]) == pytest.approx((1, 1), abs=1e-3)


def test_dead_latents_count_nothing_in_f1(data: ToyDataModule) -> None:
    m = measured(data, silent=2)
    assert m["dead"] == 0.25
    assert m["f1"] == pytest.approx(0.75, abs=1e-3)
    assert m["precision"] == pytest.approx(1, abs=1e-3)


# The table.


def result(name: str, target: int, seed: int, mcc: float) -> dict[str, Any]:
    return {"architecture": name, "target_l0": target, "seed": seed, "mcc": mcc, "x": None}


def test_standings_are_by_mcc_with_mean_and_spread() -> None:
    table = standings(
        [
            result("relu", 4, 0, 0.1),
            result("relu", 4, 1, 0.3),
            result("topk", 4, 0, 0.5),
            result("topk", 4, 1, 0.5),
            result("relu", 8, 0, 0.7),
        ]
    )
    first, second = table[4]
    assert (first["architecture"], first["mean"], first["spread"]) == (
        "topk",
        {"mcc": 0.5},
        {"mcc": 0.0},
    )
    assert second["mean"]["mcc"] == pytest.approx(0.2)
    assert second["spread"]["mcc"] == pytest.approx(0.02**0.5)
    assert table[8][0]["spread"] == {"mcc": None}


# The study.


@pytest.mark.filterwarnings("ignore:`TargetL0` did not reach its target")  # it is short
def test_study_writes_all_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path / "a", "--l0", "2,3", "--seeds", "2", "--architectures", "relu,topk")
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1].startswith("Made: ")
    for name in ("results.json", "results.csv", "pareto.png", "report.html"):
        assert str(tmp_path / "a" / name) in said[-1]
    results = json.loads((tmp_path / "a/results.json").read_text())
    rows = list(csv.DictReader((tmp_path / "a/results.csv").read_text().splitlines()))
    assert len(results["runs"]) == len(rows) == 8
    for run, row in zip(results["runs"], rows, strict=True):
        assert float(row["mcc"]) == run["mcc"]
        assert (run["coefficient"] is None) == (run["architecture"] == "topk")
    assert results["table"]["2"][0]["seeds"] == 2
    assert (tmp_path / "a/pareto.png").stat().st_size > 10_000
    page = (tmp_path / "a/report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page


def test_an_interrupted_study_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path / "a", "--l0", "2", "--seeds", "1", "--architectures", "topk")
    before = json.loads((tmp_path / "a/results.json").read_text())["runs"]
    trained: list[str] = []
    train = studying.train

    def noted(run: ArchitectureRun, *arguments: Any) -> Any:
        trained.append(run.name)
        return train(run, *arguments)

    monkeypatch.setattr(studying, "train", noted)
    study(tmp_path / "a", "--l0", "2", "--seeds", "2", "--architectures", "topk")
    assert trained == ["topk-l0-2-seed-1"]
    assert json.loads((tmp_path / "a/results.json").read_text())["runs"][0] == before[0]


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    study(tmp_path / "a", "--l0", "2", "--seeds", "1", "--architectures", "topk")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    for folder, noise in ((tmp_path / "a", "0.1"), (tmp_path / "b", "0")):
        with pytest.raises(ValueError, match="Expected argument `output` to be a new or empty"):
            study(folder, "--l0", "2", "--noise", noise)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("architectures", "relu,relu", "`architectures` to be different ones of relu"),
        ("architectures", "lista", "`architectures` to be different ones of relu"),
        ("l0", "2,0", "`l0` to be different whole numbers above 0 and less than `d_sae`=8"),
        ("l0", "8", "`l0` to be different whole numbers"),
        ("l0", "2,2", "`l0` to be different whole numbers"),
        ("l0", "1.5", "`l0` to be different whole numbers"),
        ("n_features", "1", "`n_features` to be at least 2 but got 1"),
        ("samples", "0", "`samples` to be at least 1 but got 0"),
        ("seeds", "0", "`seeds` to be at least 1 but got 0"),
        ("workers", "0", "`workers` to be at least 1 but got 0"),
        ("noise", "-1", "`noise` to be"),
        ("rare_magnitude", "0", "`rare_magnitude` to be"),
        ("n_features", "500", "`max_cosine` to be at least"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    tmp_path: Path, argument: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        study(tmp_path / "a", "--l0", "2", f"--{argument}", value)
    assert not (tmp_path / "a").exists()
