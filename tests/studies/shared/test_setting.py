"""What the studies of language models have in common."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sae.studies.shared.setting import Setting

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def test_schedules_are_shares_of_the_run_and_own_arguments_win(tmp_path: Path) -> None:
    setting = Setting(tmp_path, steps=1000, d_sae=32, lr=2e-3, batch_size=64)
    assert setting.arguments(k=3) == {
        "d_sae": 32,
        "lr": 2e-3,
        "lr_warmup_steps": 50,
        "lr_decay_steps": 250,
        "dead_after": 200 * 64,
        "k": 3,
    }
    assert setting.arguments(lr=1.0)["lr"] == 1.0
    assert Setting(tmp_path, steps=1).arguments()["dead_after"] == 1


def test_a_hook_alone_is_a_name_and_several_are_a_list(tmp_path: Path) -> None:
    several = Setting(tmp_path, HOOKS)
    assert several.data().hook_name == HOOKS
    assert several.data(hook_names=HOOKS[:1]).hook_name == HOOKS[0]
    assert Setting(tmp_path, HOOKS[1]).data().hook_name == HOOKS[1]


def test_the_stream_is_centred_scaled_and_of_the_seed(tmp_path: Path) -> None:
    data = Setting(tmp_path, batch_size=32, buffer_size=256, context_length=16).data(seed=7)
    assert (data.center, data.scale, data.seed) == (True, True, 7)
    assert (data.batch_size, data.buffer_size, data.context_length) == (32, 256, 16)


def test_more_seeds_and_another_device_go_on_in_the_same_folder(
    tmp_path: Path, small: dict[str, Any]
) -> None:
    folder = Setting(tmp_path / "study", **small, seeds=1).open(own=[1.0])
    assert Setting(tmp_path / "study", **small, seeds=5, device="cpu").open(own=(1.0,)) == folder
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["own"] == [1.0]
    assert settings["steps"] == small["steps"]
    assert not {"seeds", "device", "folder"} & set(settings)


@pytest.mark.parametrize("change", [{"steps": 9}, {"own": 2}, {"model": "embedded-2"}])
def test_other_settings_are_refused_by_name(
    tmp_path: Path, small: dict[str, Any], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Setting(tmp_path / "study", **small).open(own=1)
    # There is no model of that name, which this test is not about.
    monkeypatch.setattr("lightning_sae.data.ActivationDataModule.d_in", 128)
    settings = {**small, "own": 1, **change}
    own = settings.pop("own")
    with pytest.raises(ValueError, match=f"of a study with another `{next(iter(change))}`"):
        Setting(tmp_path / "study", **settings).open(own=own)


@pytest.mark.parametrize(
    "name", ["d_sae", "steps", "lr", "seeds", "held_out_tokens", "batch_size", "context_length"]
)
def test_numbers_out_of_range_are_named_before_anything_is_made(tmp_path: Path, name: str) -> None:
    output = tmp_path / "new"
    with pytest.raises(ValueError, match=f"`{name}`"):
        Setting(output, **{name: 0}).open()  # type: ignore[arg-type]
    assert not output.exists()
