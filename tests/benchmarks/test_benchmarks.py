"""The benchmark, without the libraries that it compares with."""

import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import formatting, measure, report, sections
from benchmarks.language_model_source import Source, absolute, layer_of
from benchmarks.libraries.base import ALL, OURS, Contender, Task, calibrate
from benchmarks.measure import (
    ROOT,
    Watch,
    forget_peak,
    held_bytes,
    peak_bytes,
    run_job,
    run_process,
    spread,
)
from benchmarks.sections import Plan
from benchmarks.synthetic_batches import gaussian_batches, sparse_batches
from benchmarks.worker import JOBS, floor, quality, run, step

SMALL: dict[str, Any] = {"d_in": 16, "d_sae": 128, "batch_size": 64, "l0": 6, "k": 3}
SMALL_SOURCE = Source(layer=0, batch_size=64, context_length=16, blocks_per_pass=8, buffer_size=256)
TINY = Plan(
    libraries=(OURS,),
    **SMALL,
    architectures=("relu", "topk"),
    n_warmup=1,
    n_steps=2,
    growth=(64,),
    run_d_in=16,
    run_d_sae=32,
    run_steps=4,
    run_features=8,
    run_active=2,
    source=Source(
        layer=0, batch_size=64, context_length=16, blocks_per_pass=8, buffer_size=256
    )._asdict(),
    stream_refills=2,
    fit_sizes=(64,),
    fit_steps=3,
    sizes=((16, 128, 6),),
    gpu_device="cpu",
    gpu_architectures=("topk",),
    gpu_d_in=16,
    gpu_sizes=(128,),
    gpu_batch_size=64,
    gpu_precisions=("bf16-mixed", "32-true"),
)


@pytest.fixture(autouse=True)
def _one_thread():
    """What is so small is done sooner by one thread than shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs run here, where importing everything anew would take longer than the jobs."""

    def run_here(job, arguments, threads, **limits):
        return json.loads(json.dumps(JOBS[job](**json.loads(json.dumps(arguments)))))

    monkeypatch.setattr(sections, "run_job", run_here)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        time = 100.0

        def perf_counter(self):
            return self.time

    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


# Time.


def test_batches_are_served_in_turn_as_often_as_there_are_steps():
    batches = [torch.zeros(1, 1), torch.ones(1, 1)]
    assert [int(batch) for batch in Watch(batches, 5)] == [0, 1, 0, 1, 0]


def test_a_step_lasts_from_one_request_to_the_next(clock):
    watch = Watch(gaussian_batches(1, 1, 1), 3)
    for seconds, _ in zip((1.0, 2.0, 4.0), watch, strict=False):
        clock.time += seconds
    list(watch)
    assert watch.seconds == [1.0, 2.0, 4.0]


def test_time_spent_looking_does_not_count(clock):
    def look(made):
        clock.time += 50.0
        looks.append(made)

    looks: list[int] = []
    watch = Watch(gaussian_batches(1, 1, 1), 2, look=look)
    for _ in watch:
        clock.time += 1.0
    assert watch.seconds == [1.0, 1.0]
    assert looks == [0, 1, 2]


def test_over_the_budget_only_the_fewest_steps_are_made(clock):
    watch = Watch(gaussian_batches(1, 1, 1), 10, budget=2.5, at_least=4)
    for _ in watch:
        clock.time += 1.0
    assert len(watch.seconds) == 4


def test_within_the_budget_a_step_more_is_begun(clock):
    watch = Watch(gaussian_batches(1, 1, 1), 10, budget=6.5, at_least=4)
    for _ in watch:
        clock.time += 1.0
    assert len(watch.seconds) == 7


def test_one_step_has_no_spread():
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


# Processes.


def test_a_process_answers_in_json():
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"a\": 1}')"
    assert run_process([sys.executable, "-c", code]) == {"a": 1}


def test_of_a_process_that_fails_the_last_line_is_told():
    assert run_process([sys.executable, "-c", "raise KeyError('gone')"]) == {
        "error": "KeyError: 'gone' (exit status 1)"
    }


def test_a_process_over_its_time_is_stopped():
    code = "import time; time.sleep(60)"
    assert run_process([sys.executable, "-c", code], timeout=0.2) == {"error": "more than 0 s"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_process_over_its_memory_is_stopped():
    code = "import time; held = bytearray(2**27); time.sleep(60)"
    answer = run_process([sys.executable, "-c", code], memory=2**26)
    assert answer == {"error": "more than 0.0625 GiB of memory"}


def test_the_peak_remembers_memory_that_was_given_back():
    before = held_bytes()
    forget_peak()
    with mmap.mmap(-1, 2**27) as held:  # the heap may have as much to spare
        held[:: mmap.PAGESIZE] = bytes(2**27 // mmap.PAGESIZE)
    assert peak_bytes() - before > 0.9 * 2**27
    assert held_bytes() - before < 0.5 * 2**27


# Contenders.


class Given(Contender):
    """Weights written by hand."""

    W_enc = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    W_dec = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])

    def __init__(self, task):
        self.threshold = 0.0

    def train(self, watch):
        list(watch)

    def set_threshold(self, threshold):
        self.threshold = threshold

    def l0(self, x):
        return (x @ self.W_enc > self.threshold).sum().item() / len(x)

    def latents(self, x):
        return torch.relu(x @ self.W_enc)

    def decode(self, f):
        return f @ self.W_dec


def test_quality_weights_latents_by_decoder_norms():
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])  # latents (1, 0, 0) and (0, 3, 3)
    found = quality(Given(None), x, l1_coefficient=0.5)  # rebuilt as (2, 0) and (0, 3)
    assert found["loss"] == pytest.approx(1 / 2 + 0.5 * (2 + 3) / 2)
    assert found["l0"] == 1.5
    assert found["fvu"] == pytest.approx(1 / (2 * (0.5**2 + 1.5**2)))


def test_calibration_gives_the_l0_asked_for():
    task = Task("relu", 2, 3, 50, 1, l0=1)
    x = gaussian_batches(1, 50, 2)[0]
    contender = Given(task)
    calibrate(contender, task, x)
    assert contender.l0(x) == pytest.approx(1.0, abs=0.05)


def test_toy_activations_have_the_features_asked_for():
    (x,) = sparse_batches(1, 4000, 32, n_features=64, n_active=3)
    # Unit directions, independent strengths s with E[s^2] = 13/12 and E[s] = 1.
    variance = x.var(dim=0).sum().item()
    assert variance == pytest.approx(3 * 13 / 12 - 3**2 / 64, rel=0.05)


@pytest.mark.parametrize("architecture", ALL)
def test_every_architecture_of_ours_is_timed_at_the_density_asked_for(architecture):
    sizes = SMALL | {"d_in": 64, "d_sae": 256, "batch_size": 256}
    task = {"architecture": architecture, **sizes, "n_steps": 4}
    found = step(OURS, task, warmup=2, budget=100.0, at_least=1)
    assert found["n_timed"] == 2
    assert found["seconds"]["median"] > 0
    assert found["note"] == "sparse"
    wanted = sizes["k"] if "topk" in architecture else sizes["l0"]
    assert found["l0"] == pytest.approx(wanted, rel=0.15)


def test_memory_of_a_step_covers_weights_gradients_and_moments():
    sizes = SMALL | {"d_in": 128, "d_sae": 16384, "batch_size": 16}
    task = {"architecture": "topk", **sizes, "n_steps": 2}
    given = {"library": OURS, "task": task, "warmup": 1, "budget": 100.0, "at_least": 1}
    found = run_job("step", given, threads=1)  # a process whose memory nothing else moves
    matrix = 4 * sizes["d_in"] * sizes["d_sae"]
    assert found["peak_bytes"] > 0.95 * 8 * matrix  # of encoder and decoder each


def test_the_peak_covers_what_was_held_for_a_moment():
    code = """
from benchmarks.measure import forget_peak, peak_bytes, held_bytes
bytearray(2**28)
before = held_bytes()
forget_peak()
bytearray(2**27)
print(peak_bytes() - before)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert 0.9 * 2**27 < int(shown) < 1.5 * 2**27


def test_dense_latents_stay_dense_and_give_the_same_training():
    plain, dense = (
        run(
            OURS,
            {"architecture": "relu", **SMALL, "n_steps": 40, "lr": 2e-2, "variant": variant},
            n_features=32,
            n_active=3,
            n_batches=4,
            look_every=15,
            budget=100.0,
        )
        for variant in ("", "dense")
    )
    assert plain["dense_steps"] < 41 == dense["dense_steps"]  # 41 looks, the last after all steps
    assert plain["loss"] == pytest.approx(dense["loss"], rel=1e-3)
    assert [look["step"] for look in plain["looks"]] == [0, 15, 30, 40]
    assert plain["looks"][-1]["loss"] == plain["loss"] < plain["looks"][0]["loss"]


def test_the_floor_is_the_product_and_adam():
    found = floor(8, 32, 16, n_steps=3, warmup=1)
    parts = found["product"]["low"] + found["adam"]["low"]
    assert 0 < parts <= found["seconds"]["high"] * 1.001


# The page.


def test_all_sections_are_measured_and_written(in_this_process, monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(99)))
    plan = replace(TINY, source=SMALL_SOURCE._replace(text=str(text))._asdict())
    monkeypatch.setattr(cli, "plan_of", lambda asked: plan)
    cli.main(["--output", str(tmp_path / "docs" / "benchmark")])
    page = (tmp_path / "docs" / "benchmark.md").read_text()
    results = json.loads((tmp_path / "docs" / "benchmark.json").read_text())
    assert list(results) == list(sections.SECTIONS)
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(headings) == len(sections.SECTIONS) + 1
    assert "failed" not in page
    assert page.count("| lightning-sae | ") == 2 + 1 + 1  # steps, run, fit


def test_a_section_measured_again_leaves_the_others(in_this_process, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "plan_of", lambda asked: replace(TINY, architectures=("topk",)))
    output = tmp_path / "benchmark.json"
    output.write_text(json.dumps({"run": made("run", rows=[])}))
    cli.main(["steps", "--output", str(output.with_suffix(""))])
    assert json.loads(output.read_text())["run"] == made("run", rows=[])
    assert "## A whole run" in output.with_suffix(".md").read_text()


def test_steps_stand_beside_the_floor_of_their_size_and_precision(in_this_process):
    section = made("floor", **sections.floor(TINY))
    text = "\n".join(report._floor(section))
    assert "### Width 16, 128 latents, L0 6, 32-true" in text
    assert "### Width 16, 128 latents, L0 6, bf16-mixed" in text
    assert text.count("| the floor | ") == 2
    assert text.count("| TopK | ") == 2
    assert text.count("target at least 1.5: ") == 2


def test_a_step_within_its_target_of_the_floor_is_said_to_be():
    floor = {"d_in": 128, "l0_asked": 20, "precision": "32-true", **FLOOR, "d_sae": 1024}
    same = {"d_in": 128, "l0_asked": 20, "precision": "32-true", "d_sae": 1024}
    for seconds, verdict in (
        (0.29, "2.90 | at most 3: reached"),
        (0.31, "3.10 | at most 3: missed"),
    ):
        section = made("floor", floors=[floor], rows=[timed(OURS, seconds) | same])
        assert verdict in "\n".join(report._floor(section))


def test_each_precision_has_its_table_and_without_a_gpu_there_is_none(in_this_process, monkeypatch):
    section = made("gpu", **sections.gpu(TINY))
    text = "\n".join(report._gpu(section))
    assert "### 128 latents, bf16-mixed" in text
    assert "### 128 latents, 32-true" in text
    assert text.count("| TopK | ") == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = made("gpu", **sections.gpu(replace(TINY, gpu_device="cuda")))
    assert section["rows"] == []
    assert "There was no GPU" in "\n".join(report._gpu(section))


def made(section: str, **content: Any) -> dict[str, Any]:
    """A section as if it had been measured."""
    plan = json.loads(json.dumps(vars(TINY) | {"architectures": ["relu"]}))
    return {"surroundings": {"date": section}, "plan": plan, **content}


def timed(library: str, median: float, **more: Any) -> dict[str, Any]:
    seconds = {"median": median, "low": median, "high": median}
    label = {"library": library, "variant": "", "architecture": "relu", "d_sae": 64}
    return label | {"seconds": seconds, "l0": 5.0, "peak_bytes": 2**20, "note": ""} | more


FLOOR = {"d_sae": 64, "seconds": timed("", 0.1)["seconds"], "product": timed("", 0.09)["seconds"]}


def test_ratios_stand_beside_their_targets_whoever_wins():
    rows = [timed(OURS, 0.2), timed("SAELens", 0.9), timed("dictionary_learning", 0.7)]
    page = report.page({"steps": made("steps", floors=[FLOOR], rows=rows)})
    best = "Time of the best peer (dictionary_learning) over ours"
    assert f"- {best}: 3.50; target at least 4: missed." in page
    assert "- Our time over the floor: 2.00; target at most 1.5: missed." in page
    assert "| SAELens | 900.0 (900.0 to 900.0) | 4.50 | 9.00 | 1 | 5.0 |" in page


def test_a_contender_that_fails_is_a_line_of_the_page():
    failed = {"library": "SAELens", "variant": "", "architecture": "relu", "d_sae": 64}
    rows = [timed(OURS, 0.2), failed | {"error": "a | b (exit status 1)"}]
    sections = {
        "steps": made("steps", floors=[FLOOR], rows=rows),
        "growth": made("growth", floors=[FLOOR], rows=rows),
        "run": made("run", rows=[failed | {"error": "c"}]),
        "stream": made("stream", rows=[{"what": "bare", "error": "d"}]),
        "fit": made("fit", rows=[failed | {"error": "e"}]),
    }
    page = report.page(sections)
    assert page.count("failed: a \\| b (exit status 1)") == 2
    assert all(f"failed: {letter}" in page for letter in "cde")
    assert "best peer" not in page


def test_ours_failing_leaves_the_others_figures():
    rows = [timed("SAELens", 0.9), {**timed(OURS, 0.2), "error": "gone"}]
    del rows[1]["seconds"]
    page = report.page({"steps": made("steps", floors=[FLOOR], rows=rows)})
    assert "| SAELens | 900.0 (900.0 to 900.0) |  | 9.00 | 1 | 5.0 |" in page
    assert "target" not in page.split("### ")[1]


def test_the_time_to_the_goal_is_that_of_the_first_look_there():
    def trained(variant, losses):
        looks = [{"seconds": float(at), "loss": loss} for at, loss in enumerate(losses)]
        end = {"wall": 9.0, "steps": 3, "loss": losses[-1], "l0": 1.0, "fvu": 0.5}
        label = {"library": OURS, "variant": variant, "dense_steps": 1}
        return label | end | {"looks": looks}

    rows = [trained("", [4.0, 2.01, 2.0]), trained("dense", [4.0, 3.0, 2.0])]
    rows.append(trained("", [4.0, 3.0, 2.5]) | {"library": "SAELens"})
    lines = report.page({"run": made("run", rows=rows)}).splitlines()
    cells = [line.split(" | ")[3] for line in lines if line.startswith(("| light", "| SAE"))]
    assert cells == ["1.0", "2.0", "not reached"]


def test_one_run_is_described_once():
    sections = {name: made("same", rows=[]) for name in ("run", "fit")}
    assert "For run, fit:\n\n- date: same\n" in report.page(sections)


def test_a_peer_is_best_among_those_that_were_measured():
    rows = [timed(OURS, 1.0), {"library": "SAELens", "variant": "", "error": "gone"}]
    assert formatting.peers(rows) == []
    assert formatting.ours(rows) == rows[0]


def test_the_picture_shows_who_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    rows = [timed(OURS, 0.2), timed("SAELens", 0.9), timed(OURS, 0.3, architecture="topk")]
    assert draw({"rows": rows, "floors": [FLOOR]}, tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


# The command line.


def test_options_are_the_fields_of_the_plan():
    asked = cli.parser().parse_args(["--growth", "8", "16", "--d-in", "4", "--libraries", OURS])
    plan = cli.plan_of(asked)
    assert (plan.growth, plan.d_in, plan.libraries) == ((8, 16), 4, (OURS,))
    assert plan.source == Source()._asdict()


def test_sections_may_be_named():
    assert cli.sections_of([]) == cli.sections_of(["all"]) == list(sections.SECTIONS)
    assert cli.sections_of(["fit", "stream"]) == ["fit", "stream"]
    assert cli.sections_of(["report"]) == []
    with pytest.raises(ValueError, match="section of steps, .* but got speed"):
        cli.sections_of(["speed"])


def test_only_the_residual_stream_behind_a_layer_can_be_compared(tmp_path):
    assert layer_of("blocks.11.hook_resid_post") == 11
    with pytest.raises(ValueError, match="hook_resid_post but got blocks.0.hook_mlp_out"):
        layer_of("blocks.0.hook_mlp_out")


def test_a_path_holds_in_another_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute("model") == str(tmp_path / "model")
    assert absolute("embedded") == "embedded"
    with pytest.raises(ValueError, match="there is no nowhere"):
        absolute("nowhere")
