"""SAEs of a study are trained together as if alone, resume when killed, and are measured alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_sae import ReLUSAE
from lightning_sae.analysis import evaluate_all_in_model, evaluate_in_model
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.studies.shared import training as together
from lightning_sae.studies.shared.evaluation import evaluate
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together
from lightning_sae.studies.shared.tuning import HeldOutObjective

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Any]) -> Setting:
    return Setting(tmp_path_factory.mktemp("study"), HOOK, **small)


def member(setting: Setting, name: str, **own: Any) -> dict[str, Any]:
    arguments = setting.arguments(decoder_norm="free", **own)
    return {"name": name, "sae": {"class_path": "lightning_sae.ReLUSAE", "init_args": arguments}}


Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(setting: Setting) -> dict[str, Any]:
    members = [member(setting, "a"), member(setting, "b", l1_coefficient=5.0)]
    return train_together(setting, setting.folder / "both", members, seed=3)


def same(first: Any, second: Any) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_member_is_what_it_would_be_alone(setting: Setting, trained: dict[str, Any]) -> None:
    assert list(trained) == ["a", "b"]
    alone = train_together(setting, setting.folder / "alone", [member(setting, "a")], seed=3)
    assert same(alone["a"], trained["a"])
    assert not same(trained["a"], trained["b"])


def test_what_is_trained_is_read_and_not_trained_again(
    setting: Setting, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_fit", lambda *_: pytest.fail("trained again"))
    again = train_together(setting, setting.folder / "both", [], seed=3)
    assert list(again) == ["a", "b"]
    assert same(again["b"], trained["b"])
    assert not (setting.folder / "both" / "checkpoints").exists()


class KilledAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_a_killed_training_goes_on_to_the_same_weights(
    setting: Setting, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "SAVE_EVERY", 3)
    folder = setting.folder / "killed"
    members = [member(setting, "a"), member(setting, "b", l1_coefficient=5.0)]
    with pytest.raises(RuntimeError, match="killed"):
        train_together(setting, folder, members, seed=3, watching=[KilledAt(5)])
    assert not (folder / "trained.json").exists()
    (folder / "saes.part" / "c").mkdir(parents=True)  # left by an export that was killed
    # The checkpoint's weights replace those that are drawn here.
    found = train_together(setting, folder, members, seed=3, watching=[KilledAt(2)])
    assert list(found) == ["a", "b"]
    assert all(same(found[name], trained[name]) for name in found)


def test_a_member_that_diverges_is_noted_and_left_out(setting: Setting) -> None:
    folder = setting.folder / "wild"
    members = [member(setting, "a"), member(setting, "wild", lr=1e38)]
    with pytest.warns(UserWarning, match="Member `wild` has stopped"):
        found = train_together(setting, folder, members, seed=3)
    assert list(found) == ["a"]
    notes = json.loads((folder / "trained.json").read_text())
    assert notes["trained"] == ["a"]
    assert "not finite" in notes["stopped"]["wild"] or "nan" in notes["stopped"]["wild"]


class Kept(Callback):
    """Keeps the SAE in the space of training; what is exported acts on raw activations."""

    def on_train_end(self, trainer, pl_module):
        self.state = {key: value.clone() for key, value in pl_module["a"].state_dict().items()}


def test_the_held_out_objective_is_that_of_all_held_out_activations(setting: Setting) -> None:
    folder, path, kept = setting.folder / "objective", setting.folder / "objective.json", Kept()
    watching = [HeldOutObjective(setting.held_out_tokens, path), kept]
    members = [member(setting, "a", l1_coefficient=2.0)]
    train_together(setting, folder, members, seed=3, watching=watching)
    raw = torch.cat(list(HeldOutBatches(setting.data(3), setting.held_out_tokens)))
    sae = kept.state
    assert sae["input_scale"] != 1
    x = (raw - sae["input_mean"]) * sae["input_scale"]
    f = ((x - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]).relu()
    error = (f @ sae["W_dec"] + sae["b_dec"] - x).square().sum(1).mean()
    cost = (f * sae["W_dec"].norm(dim=1)).sum(1).mean()
    found = json.loads(path.read_text())
    assert found == {"a": pytest.approx(float(error + 2.0 * cost), rel=1e-5)}


# Measuring.


def multiplying(factor: float) -> ReLUSAE:
    """x = relu(x) - relu(-x), so this SAE gives `factor` times x, exactly."""
    sae, eye = ReLUSAE(128, 256, b_dec_init="zero"), torch.eye(128)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(factor * torch.cat([eye, -eye]))
    return sae


def test_figures_are_those_of_each_sae_alone(setting: Setting, tmp_path: Path) -> None:
    data, n = setting.data(), setting.held_out_tokens
    saes = {"half": multiplying(0.5), "whole": multiplying(1.0)}
    found = evaluate(saes, data, n, tmp_path / "kept.json")
    assert found["half"]["relative_reconstruction_bias"] == pytest.approx(0.5, abs=1e-6)
    assert found["half"]["l2_ratio"] == pytest.approx(0.5, abs=1e-6)
    assert found["whole"]["mse"] == pytest.approx(0.0, abs=1e-6)
    x = torch.cat(list(HeldOutBatches(data, n))).double()
    assert found["half"]["mse"] == pytest.approx(float(x.square().sum(1).mean() / 4))
    assert found["half"]["l0"] == pytest.approx(float((x != 0).sum(1).double().mean()))
    on = torch.cat([x > 0, x < 0], dim=1).double().mean(0)
    assert found["half"]["frequency"] == pytest.approx(on.tolist())
    for name, sae in saes.items():
        alone = evaluate_in_model(sae, data, n)
        assert {key: found[name][key] for key in alone} == pytest.approx(alone)


def test_figures_are_read_where_they_are_kept(setting: Setting, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text('{"a": {"l0": 7}}')
    assert evaluate({}, setting.data(), 64, kept) == {"a": {"l0": 7}}


def test_any_functions_are_spliced_as_if_each_were_alone(setting: Setting) -> None:
    data, n = setting.data(), 256
    replacements = {
        "same": lambda x: x,
        "zero": torch.zeros_like,
        "half": lambda x: x / 2,
        "first": lambda x: x * (torch.arange(128) < 64),
    }
    found = evaluate_all_in_model(replacements, data, n)
    assert found["same"]["ce_spliced"] == found["same"]["ce_clean"]
    assert found["same"]["kl"] == pytest.approx(0, abs=1e-9)
    assert found["zero"]["ce_spliced"] == found["zero"]["ce_zero_ablation"]
    assert found["half"] == pytest.approx(evaluate_in_model(multiplying(0.5), data, n), rel=1e-4)
    common = ("ce_clean", "ce_zero_ablation", "ce_mean_ablation", "n_tokens")
    for name in ("first", "same"):
        alone = evaluate_all_in_model({name: replacements[name]}, data, n)
        assert alone[name] == found[name]
        assert all(found[name][key] == found["same"][key] for key in common)


def test_without_replacements_there_is_nothing_to_say(setting: Setting) -> None:
    assert evaluate_all_in_model({}, setting.data(), 32) == {}
