"""The comparison on known activations: what is saved, how a coefficient is sought, the page."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ground_truth
from benchmarks.ground_truth_worker import save_activations
from benchmarks.libraries.base import OURS
from lightning_sae.studies.ground_truth import measure
from lightning_sae.studies.ground_truth.settings import RECIPE, World


def test_saved_activations_are_sums_of_saved_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "HELD_OUT", measure.CHUNK)
    save_activations(tmp_path / "a", World(8, 8), seed=0, samples=1000)
    saved = load_file(tmp_path / "a")
    assert len(saved["train"]) % RECIPE["batch_size"] == 0
    assert len(saved["train"]) >= 1000
    torch.testing.assert_close(saved["x"], saved["magnitudes"] @ saved["features"])
    assert saved["x"].norm(dim=1).mean().item() == pytest.approx(8**0.5, rel=0.05)
    assert saved["train"].norm(dim=1).mean().item() == pytest.approx(8**0.5, rel=0.1)
    assert saved["pairs"].tolist() == [
        [parent, child] for child, parent in World(8, 8).requires().items()
    ]


def searched(monkeypatch: pytest.MonkeyPatch, first: float | None, l0_of: Any) -> dict[str, Any]:
    """The search's answer where L0 follows from the coefficient, and no training takes place."""

    def answer(job: dict[str, Any], _: Any) -> dict[str, Any]:
        return {"coefficient": job["coefficient"], "ours": {"l0": l0_of(job["coefficient"])}}

    monkeypatch.setattr(ground_truth, "_measured", answer)
    return ground_truth._matched({}, first, 8, {})


@pytest.mark.parametrize("power", [-0.5, -1.0, -2.0])
@pytest.mark.parametrize("first", [0.3, 1.0, 5.0])
def test_search_ends_at_the_wished_l0(
    monkeypatch: pytest.MonkeyPatch, power: float, first: float
) -> None:
    found = searched(monkeypatch, first, lambda c: 8 * c**power)
    assert found["ours"]["l0"] == pytest.approx(8, rel=ground_truth.CLOSE)
    assert found["trainings"] <= ground_truth.ATTEMPTS


def test_nothing_is_sought_where_there_is_no_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert searched(monkeypatch, None, lambda _: 5.0)["trainings"] == 1


def test_search_gives_the_closest_where_none_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    l0s = iter([20.0, 12.0, 4.0, 16.0])
    found = searched(monkeypatch, 1.0, lambda _: next(l0s))
    assert (found["ours"]["l0"], found["trainings"]) == (12.0, 4)


def row(library: str, mcc: float) -> dict[str, Any]:
    ours = {"l0": 8.0, "mcc": mcc, "f1": 0.5, "fvu": 0.1, "shrinkage": 0.9, "dead": 0.25}
    theirs = {
        "sae_l0": 8.0,
        "mcc": mcc,
        "explained_variance": 0.9,
        "shrinkage": 0.8,
        "dead_latents": 4,
        "classification": {"f1_score": 0.4},
    }
    own = {"library": library, "architecture": "relu", "d_sae": 16, "seconds": 2.0, "trainings": 1}
    return {**own, "ours": ours, "theirs": theirs}


def test_tables_have_mean_and_spread_and_failures() -> None:
    rows = [row(OURS, 0.6), row(OURS, 0.8), {**row("SAELens", 0.5), "error": "no memory"}]
    _, _, ours, theirs = ground_truth._table("ours", rows)
    assert "0.700 ± 0.141" in ours
    assert "failed: no memory" in theirs
    by_saelens = ground_truth._table("theirs", rows)[2]
    assert "0.1000 ± 0.0000" in by_saelens  # FVU of 0.9 explained
    assert "0.250 ± 0.000" in by_saelens  # 4 dead of 16
