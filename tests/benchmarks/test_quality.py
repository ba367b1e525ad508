"""The comparison of quality: figures of one SAE, the search of a coefficient, the page."""

from typing import Any

import pytest
import torch

from benchmarks import quality, quality_worker
from benchmarks.libraries.base import OURS
from benchmarks.quality_worker import Job, Trained, evaluate


def job(library: str = "SAELens", architecture: str = "relu", **others: Any) -> Job:
    return Job(library, architecture, None, "", d_sae=8, l0=8, batch_size=4, **others)


def test_figures_are_in_the_units_of_the_saved_activations() -> None:
    # An SAE in half units that keeps the first coordinate alone.
    x = torch.tensor([[1.0, 1.0], [3.0, -1.0], [5.0, 3.0]])
    found = evaluate(Trained(lambda x: x[:, :1], lambda f: f @ torch.eye(1, 2), unit=0.5), x)
    variance = (x - x.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(x[:, 1].square().sum() / variance))
    assert (found["l0"], found["dead"]) == (1.0, 0.0)


@pytest.mark.parametrize("power", [-0.5, -1.0, -2.0])
def test_search_ends_near_the_target(monkeypatch: pytest.MonkeyPatch, power: float) -> None:
    def measured(job: Job) -> dict[str, Any]:
        assert job.coefficient is not None
        return {"coefficient": job.coefficient, "l0": 8 * (job.coefficient / 3) ** power}

    monkeypatch.setattr(quality_worker, "_measured", measured)
    found, trainings = quality_worker._first(job())
    assert found["l0"] == pytest.approx(8, rel=quality_worker.NEAR)
    assert trainings <= quality_worker.ATTEMPTS


@pytest.mark.parametrize(("library", "architecture"), [(OURS, "relu"), ("SAELens", "topk")])
def test_what_takes_an_l0_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, library: str, architecture: str
) -> None:
    monkeypatch.setattr(quality_worker, "_measured", lambda job: {"l0": 5.0})
    assert quality_worker._first(job(library, architecture))[1] == 1


def test_the_rate_that_is_best_with_the_first_seed_has_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fvu = {1e-3: 0.3, 2e-3: 0.2, 3e-3: 0.1}
    l0 = {1e-3: 8.0, 2e-3: 8.4, 3e-3: 30.0}  # the last is beside the target

    def measured(job: Job) -> dict[str, Any]:
        assert job.lr is not None
        return {"coefficient": None, "fvu": fvu[job.lr], "l0": l0[job.lr]}

    monkeypatch.setattr(quality_worker, "_measured", measured)
    same: dict[str, Any] = {"library": OURS, "path": "", "d_sae": 8, "l0": 8, "batch_size": 4}
    rows = list(quality_worker.run(["topk"], [*fvu], seeds=2, **same))
    assert [(row["seed"], row["lr"]) for row in rows] == [(0, 2e-3), (1, 2e-3)]


def test_every_rate_is_tried_with_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(job: Job) -> dict[str, Any]:
        assert job.lr is not None
        return {"coefficient": None, "fvu": job.lr + 0.5 * (job.variant == "unit rows"), "l0": 8.0}

    monkeypatch.setattr(quality_worker, "_measured", measured)
    same: dict[str, Any] = {"library": OURS, "path": "", "d_sae": 8, "l0": 8, "batch_size": 4}
    variants = [*quality_worker.VARIANTS[OURS]]
    (row,) = quality_worker.run(["topk"], [2e-3, 1e-3], seeds=1, variants=variants, **same)
    assert (row["lr"], row["variant"]) == (1e-3, "free rows")
    assert [*row["tried"]] == [f"{rate}, {rows}" for rate in (0.002, 0.001) for rows in variants]


def test_an_exact_l0_of_ours_is_found_by_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(job: Job) -> dict[str, Any]:
        assert job.coefficient is not None
        return {"coefficient": job.coefficient, "l0": 1.2 * job.coefficient**0.9}

    monkeypatch.setattr(quality_worker, "_measured", measured)
    found, _ = quality_worker._first(job(OURS, exact=True))
    assert found["l0"] == pytest.approx(8, rel=quality_worker.CLOSEST)


def test_bold_is_the_least_error_at_the_target() -> None:
    rows: list[dict[str, Any]] = [
        {"library": OURS, "architecture": "topk", "fvu": 0.2, "l0": 8.0},
        {"library": "SAELens", "architecture": "topk", "fvu": 0.3, "l0": 8.5},
        {"library": "dictionary_learning", "architecture": "topk", "fvu": 0.1, "l0": 30.0},
        {"library": OURS, "architecture": "gated", "fvu": 0.2, "l0": 8.0},
        {"library": "SAELens", "architecture": "gated", "error": "ValueError: no"},
    ]
    gated, topk = quality._table(rows, 8)[2:]
    assert "| **0.2000 ± 0.0000** | 0.3000 ± 0.0000 | 0.1000 ± 0.0000 |" in topk
    assert "| **0.2000 ± 0.0000** | failed: ValueError: no |" in gated


def test_new_rows_replace_those_of_their_setting_library_and_architecture() -> None:
    def row(setting: str, library: str, fvu: float) -> dict[str, Any]:
        return {"setting": setting, "library": library, "architecture": "topk", "fvu": fvu}

    about = {"command": "`new`", "date": "today", "compared": "a 1", "with": "b 2"}
    plan = {"steps": 5}
    rows = [row("defaults", OURS, 1.0), row("recipe", OURS, 2.0), row("recipe", "SAELens", 3.0)]
    before = {"commands": ["`old`"], "plan": plan, "activations": {}, "rows": rows}
    found = quality.merged(before, about, plan, {}, [row("recipe", OURS, 4.0)])
    assert [each["fvu"] for each in found["rows"]] == [1.0, 3.0, 4.0]
    assert found["commands"] == ["`old`", "`new`, today, with a 1, b 2"]
    other = quality.merged(before, about, {"steps": 6}, {}, [row("recipe", OURS, 4.0)])
    assert len(other["rows"]) == len(other["commands"]) == 1


def test_the_chosen_rate_is_shown_where_there_was_a_choice() -> None:
    same = {"library": OURS, "architecture": "topk", "fvu": 0.2, "l0": 8.0, "lr": 0.004}
    both: dict[str, Any] = {"0.004": {}, "0.008": {}}
    head, _, chosen = quality._table([{**same, "tried": both}], 8)
    assert head.endswith("| ours: choice |")
    assert chosen.endswith("| 0.004 |")
    assert quality._rates([{"tried": both}])[0] == "Learning rate 0.004 or 0.008."
    with_norms: dict[str, Any] = {"variant": "free rows", "tried": both}
    assert quality._table([{**same, **with_norms}], 8)[2].endswith("| 0.004, free rows |")
    assert quality._rates([{"tried": {"0.004, unit rows": {}}}])[0] == "Learning rate 0.004."
    assert "choice" not in quality._table([{**same, "tried": {"0.004": {}}}], 8)[0]
