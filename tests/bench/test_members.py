"""What `lightning-sae bench` tells of several SAEs side by side."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_sae.bench.members import MemberClock
from lightning_sae.cli import main
from lightning_sae.side_by_side.member import Member

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]  # 128 and 512 wide
NORM = {"class_path": "lightning_sae.callbacks.DecoderNormProjection"}
# A callback that changes weights: there must be nothing of it while others are measured.
RESAMPLING = {
    "class_path": "lightning_sae.callbacks.DeadFeatureResampling",
    "init_args": {"every_n_steps": 1, "n_inputs": 64},
}
CONFIG: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "default_root_dir": "run", "max_steps": 1000},
    "model": {
        "class_path": "lightning_sae.SideBySide",
        "init_args": {
            "members": [
                {
                    "name": "relu",
                    "sae": {
                        "class_path": "lightning_sae.ReLUSAE",
                        "init_args": {"d_sae": 256, "lr_decay_steps": 500},
                    },
                    "callbacks": [NORM, RESAMPLING],
                    "sweep": {"hook_name": HOOKS},
                },
                {
                    "name": "topk",
                    "hook_name": HOOKS[0],
                    "sae": {
                        "class_path": "lightning_sae.TopKSAE",
                        "init_args": {"d_sae": 64, "k": 5},
                    },
                    "callbacks": [NORM],
                },
            ]
        },
    },
    "data": {
        "class_path": "lightning_sae.ActivationDataModule",
        "init_args": {
            "hook_name": HOOKS,
            "context_length": 32,
            "blocks_per_pass": 8,
            "batch_size": 128,
            "buffer_size": 512,
            "scale": True,
        },
    },
    "l0": 10,
    "steps": 6,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command, when it has measured three SAEs at two hooks in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bench"))
        patch.setattr("sys.argv", ["lightning-sae"])
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        found: dict[str, Any] = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what is so small is done sooner by one
        patch.setattr("lightning_sae.commands.run.say", lambda *lines: found.update(lines=lines))
        cli = main(["bench", "--config", "config.yaml"])
        torch.set_num_threads(threads)
        found["files"] = sorted(str(path) for path in Path("run").rglob("*"))
        return found | {
            "model": cli.model,
            "figures": json.loads(Path("run/bench.json").read_text()),
        }


@pytest.fixture
def figures(measured: Any) -> dict[str, Any]:
    return measured["figures"]


def test_each_member_has_its_time_and_memory(figures: dict[str, Any]) -> None:
    members = figures["members"]
    assert [member["name"] for member in members] == [
        *(f"relu-hook_name={hook}" for hook in HOOKS),
        "topk",
    ]
    for member, d_in, d_sae in zip(members, (128, 512, 128), (256, 256, 64), strict=True):
        assert (member["d_in"], member["d_sae"]) == (d_in, d_sae)
        assert member["state_bytes"] == 4 * 4 * (2 * d_in * d_sae + d_in + d_sae)
        assert all(member[f"{part}_seconds"] > 0 for part in ("gradient", "optimizer", "rest"))
    assert figures["state_bytes"] == sum(member["state_bytes"] for member in members)
    assert figures["buffer_bytes"] == 512 * (128 + 512) * 4


def test_a_step_is_that_of_all_members_and_little_more(figures: dict[str, Any]) -> None:
    alone = sum(member["step_seconds"] for member in figures["members"])
    # Medians of parts and of the whole, of few steps: equal up to the scatter of the steps.
    assert alone == pytest.approx(figures["members_seconds"], rel=0.5)
    assert 0 < figures["members_seconds"] < figures["step_seconds"]
    assert figures["rest_seconds"] > 0


def test_saes_have_the_l0_asked_for_or_their_own(figures: dict[str, Any]) -> None:
    first, second, topk = (member["l0"] for member in figures["members"])
    assert first == pytest.approx(10, rel=0.3)
    assert second == pytest.approx(10, rel=0.3)
    assert topk == pytest.approx(5, rel=0.1)  # less those that are not positive


def test_the_language_model_is_a_part_of_the_stream(figures: dict[str, Any]) -> None:
    assert figures["language_model_seconds"] > 0
    assert figures["stream_seconds"] == pytest.approx(
        128 / figures["stream_activations_per_second"]
    )


def test_the_planned_run_takes_so_many_batches_of_a_run(figures: dict[str, Any]) -> None:
    assert figures["planned_steps"] == 1000
    assert figures["planned_hours"] == pytest.approx(1000 * figures["together_seconds"] / 3600)


def test_nothing_is_trained_and_nothing_else_is_written(measured: Any) -> None:
    assert measured["files"] == ["run/bench.json"]
    for member in measured["model"].members:
        torch.testing.assert_close(member.sae.W_enc, member.sae.W_dec.T)  # as it was made
        assert not vars(member).keys() & {"step", "end_batch"}  # no clock is left


def test_the_table_has_a_line_for_each_and_shares_that_sum_to_one(measured: Any) -> None:
    lines, figures = measured["lines"], measured["figures"]
    assert lines[-1] == "Made: run/bench.json"
    head = next(i for i, line in enumerate(lines) if line.startswith("milliseconds"))
    rows = {line[:40].strip(): line.split() for line in lines[head + 1 : head + 9]}
    for member in figures["members"]:
        *_, step, _, mib = rows[member["name"][:40]]
        assert float(step) == pytest.approx(1e3 * member["step_seconds"], abs=0.01)
        assert float(mib) == pytest.approx(member["state_bytes"] / 2**20, abs=0.1)
    parts = [rows[name] for name in ("all members", "the stream, once for all")]
    shares = [float(row[-1].rstrip("%")) for row in parts]
    assert sum(shares) <= 100.1
    assert rows["total"][-1] == "100.0%"
    assert "a run of 1,000 steps, 128,000 activations" in lines[-3]


def test_a_clock_counts_a_members_own_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each part moves on by a number of its own."""
    from lightning_sae.bench import members as bench_members

    at = [0.0]
    monkeypatch.setattr(bench_members, "now", lambda _: at[0])
    monkeypatch.setattr(bench_members, "WARM_UP", 1)

    class Part(Member):
        def __init__(self, pace: float) -> None:
            self.pace = pace

        def start_batch(self, *_: Any) -> None:
            at[0] += self.pace

        forward_and_backward = step = end_batch = start_batch  # type: ignore[assignment]

    members = [Part(1.0), Part(10.0)]
    before = copy.copy(members[0])
    clocks = [MemberClock(member, "cpu") for member in members]
    for _ in range(3):
        for part in bench_members.PARTS:
            for member in members:
                getattr(member, part)()
    assert [clock.steps() for clock in clocks] == [[4.0, 4.0], [40.0, 40.0]]
    assert clocks[1].steps(["step"]) == [10.0, 10.0]
    clocks[0].remove()
    assert vars(members[0]) == vars(before)
