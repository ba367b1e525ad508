"""The comparison of one run with as many runs as SAEs, on a tiny scale and in one process."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import side_by_side, side_by_side_worker
from benchmarks.side_by_side_worker import JOBS, Plan

TINY = {
    "coefficients": (0.5,),
    "steps": 5,
    "d_sae": 32,
    "batch_size": 64,
    "buffer_size": 256,
    "context_length": 16,
    "blocks_per_pass": 4,
}
OPTIONS = [
    f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "coefficients"
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What is so small is done sooner by one thread than shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are done here and now: a process takes seconds to start."""

    def run_process(command: Sequence[str], threads: int, timeout: float) -> dict[str, Any]:
        call = json.loads(command[-1])
        assert command[1:3] == ["-m", "benchmarks.side_by_side_worker"]
        return JOBS[call["job"]](Plan(**call["plan"]), **call["arguments"])

    monkeypatch.setattr(side_by_side, "run_process", run_process)


@pytest.mark.usefixtures("_in_this_process")
def test_saes_are_the_same_in_one_run_and_in_many(capsys: pytest.CaptureFixture[str]) -> None:
    side_by_side.main([*OPTIONS, "--coefficients", "0.5", "--output", "out"])
    results = json.loads(Path("out/side_by_side.json").read_text())
    together, alone = results["together"], results["alone"]
    assert len(alone) == 2 * 2
    same = {member["name"]: member["sha256"] for member in together["members"]}
    assert {run["name"]: run["sha256"] for run in alone} == same
    assert len(set(same.values())) == len(same)
    # 5 batches of 64 and what is left of the first 256: filled once, and then half of it anew.
    assert together["tokens"] >= 5 * 64
    assert set(results["language_model"]["walls"]) == {run["hook"] for run in alone}
    text = capsys.readouterr().out
    assert text == Path("out/side_by_side.md").read_text()
    assert "Weights equal bit for bit: 4 of 4." in text


def test_the_page_sums_up_runs_and_models() -> None:
    hooks, names = ["first", "second"], ["a", "b"]
    runs = zip(names, hooks, (3.0, 5.0), strict=True)
    results = {
        "surroundings": dict.fromkeys(side_by_side.ABOUT, "x"),
        "plan": Plan(hooks=hooks, architectures=["A"], coefficients=[1.0])._asdict(),
        "together": {
            "wall": 4.0,
            "tokens": 10,
            "peak_bytes": 2**21,
            "members": [{"name": "a", "sha256": "1"}, {"name": "b", "sha256": "2"}],
        },
        "alone": [
            {"name": name, "hook": hook, "wall": wall, "sha256": "1", "l0": 2.0}
            for name, hook, wall in runs
        ],
        "alone_peak_bytes": 2**20,
        "language_model": {"wall": 1.0, "walls": {"first": 0.5, "second": 1.1}},
    }
    text = side_by_side.page(results)
    assert "| 2 SAEs in one run | 4.0 | 1.00 | 2 |" in text
    assert "| 2 runs, one after another | 8.0 | 2.00 | 1 |" in text
    assert "| the language model alone, on the tokens of a run | 1.0 | 0.25 |" in text
    assert "| the language model alone, on those of 2 runs | 1.6 | 0.40 |" in text
    assert "takes 50% of the time" in text
    assert "is 25% of the one run, and 20% of the 2" in text
    assert "Weights equal bit for bit: 1 of 2." in text


def test_a_process_rehearses_on_a_tiny_plan_and_writes_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Plan, int]] = []

    def job(plan: Plan, tokens: int) -> dict[str, float]:
        asked.append((plan, tokens))
        return {"wall": 1.0}

    monkeypatch.setitem(JOBS, "language_model", job)
    plan, threads = Plan(), torch.get_num_threads()
    call = {"job": "language_model", "plan": plan._asdict(), "arguments": {"tokens": 10**6}}
    side_by_side_worker.main(json.dumps(call | {"threads": threads}), "answer.json")
    (rehearsal, few), (_, tokens) = asked
    assert rehearsal.steps < 5
    assert few < 100
    assert tokens == 10**6
    assert json.loads(Path("answer.json").read_text()) == {"wall": 1.0}


def test_a_part_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "run_process", lambda *_: {"error": "no memory"})
    with pytest.raises(RuntimeError, match="together failed: no memory"):
        side_by_side.main([*OPTIONS, "--output", "out"])
