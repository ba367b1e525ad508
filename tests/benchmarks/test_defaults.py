"""The page of what the defaults give."""

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


def test_the_summary_names_the_row_that_is_furthest_from_the_target() -> None:
    rows = [row("ReLUSAE", 28.8), row("TopKSAE", 32.0, dead=0.25), row("GatedSAE", 33.0)]
    far, dead = defaults.summary(rows)
    assert "`ReLUSAE` with 64 latents, seed 0, -10.0%" in far
    assert "`TopKSAE`" in dead
    assert "25.0%" in dead
