"""A checkpoint whose weights stay in the file is checked and read like any other."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import checkpoints, tensors
from lightning_sae.archives import tensors_in
from lightning_sae.checkpoints import read_checkpoint
from lightning_sae.tensors import not_finite
from tests.ranks.split_memory import most_bytes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with all kinds of entries."""
    torch.manual_seed(0)
    weights = {"W_enc": torch.randn(64, 100).T, "W_dec": torch.randn(64, 100)}
    content = {
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(64, 100)}}}],
        "callbacks": {"Counts": {"seen": [torch.arange(5), (torch.ones(3), 2)], "n": 3}},
        "epoch": 0,
        "global_step": 4,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_it_has_the_same_content(saved: Path) -> None:
    read, mapped = read_checkpoint(saved), read_checkpoint(saved, mapped=True)
    assert list(mapped) == list(read)
    for found, expected in zip(tensors_in(mapped), tensors_in(read), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert mapped["callbacks"]["Counts"]["n"] == 3
    assert mapped["callbacks"]["Counts"]["seen"][1][1] == 2


def test_only_weights_and_moments_stay_in_the_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else may be kept for the rest of the run, when the file is gone."""
    monkeypatch.setattr(tensors, "PIECE", 128)
    found: list[dict[str, Any]] = []
    size = saved.stat().st_size
    used = most_bytes(lambda: found.append(read_checkpoint(saved, mapped=True)), mapped=size)
    assert used < 64 * 100 * 4 / 8
    mapped = found[0]
    with saved.open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(mapped["callbacks"]["Counts"]["seen"][0], torch.arange(5))
    assert torch.equal(mapped["callbacks"]["Counts"]["seen"][1][0], torch.ones(3))


@pytest.mark.parametrize("name", ["W_dec", "exp_avg", "nothing"])
def test_damage_is_refused(name: str, saved: Path) -> None:
    """With the same words, wherever it is."""
    content = read_checkpoint(saved)
    places = {**content["state_dict"], **content["optimizer_states"][0]["state"][0]}
    whole = bytearray(saved.read_bytes())
    if name == "nothing":
        del whole[len(whole) // 2 :]
    else:
        whole[whole.index(places[name].numpy().tobytes()) + 77] ^= 1
    saved.write_bytes(whole)
    said = []
    for mapped in (False, True):
        with pytest.raises(ValueError, match="is damaged|not an archive") as error:
            read_checkpoint(saved, mapped=mapped)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    content = read_checkpoint(saved)
    content["state_dict"]["W_enc"][3, 5] = torch.inf
    torch.save(content, saved)
    with pytest.raises(ValueError, match=r"not finite \(W_enc\)"):
        read_checkpoint(saved, mapped=True)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of its checksums and reading, another process may put a new one there."""
    damaged_entries = checkpoints._damaged_entries

    def replacing(path: Any, file: Any) -> set[str]:
        found = damaged_entries(path, file)
        other = saved.with_suffix(".new")
        other.write_bytes(saved.read_bytes())
        os.replace(other, saved)
        return found

    monkeypatch.setattr(checkpoints, "_damaged_entries", replacing)
    with pytest.raises(ValueError, match="was replaced meanwhile"):
        read_checkpoint(saved, mapped=True)


@pytest.mark.parametrize("place", [(0, 0), (7, 50), (63, 99)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_value_that_is_not_finite_is_found_in_any_piece(
    place: tuple[int, int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE", 300)
    weight = torch.zeros(64, 100)
    weight[place] = torch.nan
    weight = weight.T if transposed else weight
    assert not_finite(
        {"W": weight, "b": torch.zeros(64), "n": torch.ones((), dtype=torch.int64)}
    ) == ["W"]
    assert not_finite({"W": weight.new_zeros(weight.shape)}) == []


def test_low_thresholds_are_allowed_in_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """-inf, below all values; but neither inf nor nan."""
    monkeypatch.setattr(tensors, "PIECE", 4)
    for value, bad in ((-torch.inf, []), (torch.inf, ["t"]), (torch.nan, ["t"])):
        threshold = torch.zeros(10)
        threshold[8] = value
        assert not_finite({"t": threshold}) == bad


def test_the_check_needs_memory_for_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 2**12)
    weights = {"W_enc": torch.zeros(2**10, 2**8).T, "W_dec": torch.zeros(2**10, 2**8)}
    assert most_bytes(lambda: not_finite(weights)) < 12 * 2**12
