import pytest
import torch

from lightning_sae import ActivationDataModule
from lightning_sae.data import devices
from lightning_sae.data.devices import picked, place_of_buffer

GPU, CPU = torch.device("cuda:1"), torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "training", "nbytes", "place"),
    [
        ("auto", CPU, 1, CPU),
        ("auto", GPU, 50, GPU),
        ("auto", GPU, 51, CPU),
        ("cpu", GPU, 1, CPU),
        ("cuda:0", GPU, 1000, torch.device("cuda:0")),
        ("cuda", CPU, 1000, torch.device("cuda")),
    ],
)
def test_a_buffer_lies_on_the_gpu_that_trains_if_half_of_what_is_free_is_enough(
    asked: str,
    training: torch.device,
    nbytes: int,
    place: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda device: {GPU: 100}[device])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert place_of_buffer(asked, training, nbytes) == place


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x"])
def test_a_device_for_the_buffer_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"`buffer_device` to be `auto`, `cpu` or a GPU .* but"):
        ActivationDataModule("blocks.0.hook_resid_post", buffer_device=name)


def test_a_gpu_that_this_machine_lacks_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="`buffer_device` to be one of the devices .* cuda:1: use"):
        place_of_buffer("cuda:1", CPU, 1)


def test_picked_rows_are_those_of_the_places() -> None:
    rows = torch.arange(12.0).view(4, 3)
    places = torch.tensor([2, 0])
    assert torch.equal(picked(rows, places, CPU), rows[places])
