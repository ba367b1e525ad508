"""The page of what the defaults give."""

from pathlib import Path
from typing import Any

from benchmarks import defaults


def row(kind: str, l0: float, dead: float = 0.0, seed: int = 0) -> dict[str, Any]:
    figures = {"l0": l0, "fvu": 0.1, "loss_recovered_zero": 0.9, "dead_fraction": dead}
    return {"architecture": kind, "d_sae": 64, "seed": seed, **figures}


def test_new_rows_replace_those_of_their_architectures() -> None:
    about, plan = {"command": "`new`", "date": "today"}, {"steps": 5}
    before = {
        "commands": ["`old`, yesterday"],
        "plan": plan,
        "rows": [row("ReLUSAE", 30.0), row("TopKSAE", 32.0)],
    }
    found = defaults.merged(before, about, plan, [row("ReLUSAE", 31.0)])
    assert [(r["architecture"], r["l0"]) for r in found["rows"]] == [
        ("ReLUSAE", 31.0),
        ("TopKSAE", 32.0),
    ]
    assert found["commands"] == ["`old`, yesterday", "`new`, today"]
    alone = defaults.merged(before, about, {"steps": 6}, [row("ReLUSAE", 31.0)])
    assert len(alone["rows"]) == len(alone["commands"]) == 1


def test_other_arguments_are_beside_the_defaults_and_not_among_them() -> None:
    other = {**row("ReLUSAE", 33.0, dead=0.5), "given": "lr_decay_steps=0.25", "fvu": 0.08}
    rows = [row("ReLUSAE", 31.0, dead=0.1), other]
    part: dict[str, Any] = {
        "plan": {"hook": "h", "steps": 5, "batch_size": 4, "seeds": 1},
        "commands": [],
    }
    text = defaults.page({"m": {**part, "rows": rows}})
    assert "| `ReLUSAE` | 64 | 31.0 ± 0.0 | 0.100 ± 0.000 |" in text
    assert "| `ReLUSAE` | 64 | `lr_decay_steps=0.25` | 33.0 ± 0.0 | -20.0% |" in text
    assert "0.100 ± 0.000 to 0.500 ± 0.000" in text
    assert "Most dead latents: `ReLUSAE` with 64 latents, seed 0, 10.0%" in text
    again = defaults.merged(
        {**part, "rows": rows}, {"command": "", "date": ""}, part["plan"], [other]
    )
    assert [r["l0"] for r in again["rows"]] == [31.0, 33.0]


def test_given_arguments_reach_every_class_beside_its_own() -> None:
    words = [
        "--architectures",
        "TiedSAE",
        "--given",
        "revive=auxk",
        "dead_after=9",
        "--given",
        "lr=1",
    ]
    plan = defaults.run(defaults.parser().parse_args(words), Path("run"))
    members = plan["model"]["init_args"]["members"]
    assert [member["name"] for member in members] == [
        "TiedSAE-revive-auxk-dead_after-9",
        "TiedSAE-lr-1",
    ]
    assert members[0]["sae"]["init_args"] == {"target_l0": 32, "revive": "auxk", "dead_after": 9}


def test_the_summary_names_the_row_that_is_furthest_from_the_target() -> None:
    rows = [row("ReLUSAE", 28.8), row("TopKSAE", 32.0, dead=0.25), row("GatedSAE", 33.0)]
    far, dead = defaults.summary(rows)
    assert "`ReLUSAE` with 64 latents, seed 0, -10.0%" in far
    assert "`TopKSAE`" in dead
    assert "25.0%" in dead
