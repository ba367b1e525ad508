"""Long steps of an evaluation say how far they are."""

import pytest

from lightning_sae.analysis.evaluation import progress


def test_a_long_step_says_its_share_and_a_short_one_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter((0.0, 5.0, 16.0, 16.0, 20.0, 32.0, 32.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    step = progress.Progress(said.append, "reading", 10)
    step.add(5)
    assert said == []
    for _ in range(3):
        step.add(2)
    assert said == ["reading: 70%", "reading: 100%"]
