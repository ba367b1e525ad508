"""Frequencies over training: windows, their sums, and a resumed run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sae.studies.shared.snapshots import (
    FrequencySnapshots,
    Snapshots,
    read_snapshots,
)

D_SAE, BATCH = 5, 10

pytestmark = pytest.mark.usefixtures("unchecked")  # for a trainer that only counts


class Strategy:
    def reduce(self, value: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return value


def run(callback: FrequencySnapshots, fired: list[Tensor], first: int = 0, micro: int = 1) -> None:
    """Let a callback see batches; every `micro` of them are a step."""
    trainer: Any = SimpleNamespace(
        strategy=Strategy(), world_size=1, is_global_zero=True, global_step=first
    )
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for i, each in enumerate(fired):
        trainer.global_step = first + (i + 1) // micro
        callback.on_train_batch_end(trainer, None, {"fired": each}, torch.zeros(BATCH, 2), i)  # type: ignore[arg-type]


def batches(n: int) -> list[Tensor]:
    return [torch.randint(0, BATCH, (D_SAE,)) for _ in range(n)]


def test_each_window_has_the_sum_of_its_batches(tmp_path: Path) -> None:
    fired, path = batches(7), tmp_path / "new" / "a.safetensors"
    run(FrequencySnapshots(path, 3), fired)
    found = read_snapshots(path)
    assert found.steps.tolist() == [3, 6]
    assert found.n.tolist() == [30, 30]
    assert found.counts.tolist() == [sum(fired[:3]).tolist(), sum(fired[3:6]).tolist()]  # type: ignore[union-attr]


def test_micro_batches_of_a_step_belong_to_its_window(tmp_path: Path) -> None:
    fired, path = batches(8), tmp_path / "a.safetensors"
    run(FrequencySnapshots(path, 2), fired, micro=2)
    found = read_snapshots(path)
    assert found.steps.tolist() == [2, 4]
    assert found.n.tolist() == [40, 40]
    assert found.counts[1].tolist() == sum(fired[4:]).tolist()  # type: ignore[union-attr]


def test_a_run_that_goes_on_counts_as_one_that_was_not_broken_off(tmp_path: Path) -> None:
    fired = batches(10)
    paths = [tmp_path / f"{name}.safetensors" for name in ("whole", "part", "part")]
    whole, first, second = (FrequencySnapshots(path, 3) for path in paths)
    run(whole, fired)
    run(first, fired[:7])  # windows up to 6; the checkpoint below is of step 4
    checkpointed = FrequencySnapshots(tmp_path / "other.safetensors", 3)
    run(checkpointed, fired[:4])
    second.load_state_dict(checkpointed.state_dict())
    run(second, fired[4:], first=4)
    for one, other in zip(read_snapshots(paths[0]), read_snapshots(paths[1]), strict=True):
        assert torch.equal(one, other)


def test_frequency_is_over_the_windows_up_to_one() -> None:
    counts = torch.tensor([[1, 0], [2, 4], [6, 0]], dtype=torch.int32)
    found = Snapshots(torch.tensor([1, 2, 3]), torch.tensor([10, 10, 20]), counts)
    assert found.frequency(-1).tolist() == [0.3, 0.0]
    assert found.frequency(-1, last=2).tolist() == pytest.approx([8 / 30, 4 / 30])
    assert found.frequency(1, last=5).tolist() == pytest.approx([3 / 20, 4 / 20])
    assert found.frequency(0, last=5).tolist() == [0.1, 0.0]


def test_windows_of_no_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`every_n_steps` to be positive but got 0"):
        FrequencySnapshots(tmp_path / "a.safetensors", 0)
