"""Runs of several members on the language model: hooks, sweeps, checkpoints, results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import lightning_sae
from lightning_sae import ActivationDataModule, SideBySide
from lightning_sae.callbacks import RunCheckpoint
from lightning_sae.cli import main
from lightning_sae.side_by_side.results import COLUMNS

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]
CALLBACKS = [
    {"class_path": "lightning_sae.callbacks.DecoderNormProjection"},
    {"class_path": "lightning_sae.callbacks.L1Warmup", "init_args": {"n_steps": 3}},
]
RELU = {"class_path": "lightning_sae.ReLUSAE", "init_args": {"d_sae": 64, "lr_decay_steps": 2}}
MEMBERS = [
    {
        "name": "relu",
        "sae": RELU,
        "callbacks": CALLBACKS,
        "sweep": {"hook_name": HOOKS, "l1_coefficient": [1.0, 4.0], "seed": [3]},
    },
    {
        "name": "topk",
        "hook_name": HOOKS[1],
        "sae": {"class_path": "lightning_sae.TopKSAE", "init_args": {"d_sae": 32, "k": 4}},
        "callbacks": CALLBACKS[:1],
    },
]
DATA = {
    "context_length": 32,
    "blocks_per_pass": 4,
    "batch_size": 64,
    "buffer_size": 320,
    "center": True,
    "scale": True,
    "n_validation": 256,
    "n_test": 256,
    "max_norm_multiple": 50.0,
}


def run(root: Path, model: dict[str, Any], hook_name: Any, **settings: Any) -> Any:
    trainer = {
        "default_root_dir": str(root),
        "accelerator": "cpu",
        "max_steps": 6,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 2,
        "enable_model_summary": False,
        **settings.pop("trainer", {}),
    }
    data = {
        "class_path": "lightning_sae.ActivationDataModule",
        "init_args": {"hook_name": hook_name, **DATA},
    }
    quick = {"progress_bar": {"refresh_rate": 0}, "evaluation": {"n_tokens": 512}}
    config = {"trainer": trainer, "model": model, "data": data, **quick}
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, **settings}))
    return main(["fit", "--config", str(path)])


def side_by_side(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {"class_path": "lightning_sae.SideBySide", "init_args": {"members": members}}


def held_out_curves(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard shows of validations, by name."""
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("val/", "hp_metric"))]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def test_members_are_what_the_command_makes_of_each_alone(tmp_path: Path) -> None:
    root = tmp_path / "together"
    cli = run(root, side_by_side(MEMBERS), HOOKS)
    names = [member.name for member in cli.model.members]
    assert len(names) == 5
    name = f"relu-hook_name={HOOKS[1]}-l1_coefficient=4.0-seed=3"
    assert name in names
    arguments = {**RELU["init_args"], "l1_coefficient": 4.0}  # type: ignore[dict-item]
    alone = {**RELU, "init_args": arguments}
    run(tmp_path / "relu", alone, HOOKS[1], seed_everything=3, trainer={"callbacks": CALLBACKS})
    run(tmp_path / "topk", MEMBERS[1]["sae"], HOOKS[1], trainer={"callbacks": CALLBACKS[:1]})  # type: ignore[arg-type]
    for member, other in ((name, "relu"), ("topk", "topk")):
        found = load_file(root / "members" / member / "sae" / "sae.safetensors")
        expected = load_file(tmp_path / other / "sae" / "sae.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        sae = lightning_sae.load(root / "members" / member / "sae")
        assert sae.source == lightning_sae.load(tmp_path / other / "sae").source
        together = held_out_curves(root / "tensorboard" / member)
        assert together == held_out_curves(tmp_path / other / "tensorboard")
        assert together["val/ce_clean"] < together["val/ce_spliced"]
    last = str(root / "checkpoints" / "last.ckpt")
    main(["test", "--config", str(root / "config.yaml"), "--ckpt_path", last])
    last = str(tmp_path / "topk" / "checkpoints" / "last.ckpt")
    main(["test", "--config", str(tmp_path / "topk" / "config.yaml"), "--ckpt_path", last])
    results = json.loads((root / "members" / "topk" / "results.json").read_text())
    assert results == json.loads((tmp_path / "topk" / "results.json").read_text())
    assert results["ce_spliced"] > results["ce_clean"]
    assert {*COLUMNS, "loss_recovered_zero"} <= results.keys()  # what the terminal shows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SideBySide]:
    """A run's folder, and its model."""
    root = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lightning-sae"])
        return root, run(root, side_by_side(MEMBERS), HOOKS, trainer={"logger": False}).model


def again(command: str, root: Path) -> None:
    last = str(root / "checkpoints" / "last.ckpt")
    main([command, "--config", str(root / "config.yaml"), "--ckpt_path", last])


def test_a_member_is_loaded_from_the_checkpoint_of_all(trained: tuple[Path, SideBySide]) -> None:
    root, model = trained
    last = root / "checkpoints" / "last.ckpt"
    for member in model.members:
        sae, x = lightning_sae.load(last, member=member.name), torch.randn(5, member.sae.d_in)
        assert torch.equal(sae(x), member.sae(x))
        assert sae.source["hook_name"] == member.hook_name
    with pytest.raises(ValueError, match="`member` to be one of relu.*topk.* but got None"):
        lightning_sae.load(last)


def test_latents_of_each_member_are_predicted_at_its_hook(
    trained: tuple[Path, SideBySide], capsys: pytest.CaptureFixture[str]
) -> None:
    root, model = trained
    again("predict", root)
    said = capsys.readouterr().out.splitlines()
    for member in model.members:
        folder = root / "members" / member.name / "latents"
        assert said.count(f"  {folder}") == 1
        data = ActivationDataModule(member.hook_name, **DATA)  # type: ignore[arg-type]
        files, batches = sorted(folder.iterdir()), list(data.predict_dataloader())
        assert len(files) == len(batches) > 1
        for path, batch in zip(files, batches, strict=True):
            found, f = load_file(path), member.sae.encode(batch)
            rows = torch.repeat_interleave(torch.arange(len(f)), found["starts"].diff())
            assert torch.equal(f[rows, found["latents"]], found["values"])
            assert len(rows) == f.count_nonzero()


def test_validation_shows_figures_of_each_member(
    trained: tuple[Path, SideBySide], capsys: pytest.CaptureFixture[str]
) -> None:
    root, model = trained
    again("validate", root)
    said = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["val/l0", "val/fvu", "val/dead_fraction"] for line in said)
    for member in model.members:
        (line,) = (line for line in said if line.startswith(f"  {member.name} "))
        data = ActivationDataModule(member.hook_name, **DATA)  # type: ignore[arg-type]
        x = torch.cat(list(data.val_dataloader()))
        f = member.sae.encode(x)
        variance = (x - x.mean(0)).pow(2).sum()
        expected = [
            f.count_nonzero() / len(f),
            (x - member.sae.decode(f)).pow(2).sum() / variance,
            (f == 0).all(0).float().mean(),
        ]
        assert [float(value) for value in line.split()[1:]] == pytest.approx(
            [value.item() for value in expected], rel=1e-3
        )


def test_a_folder_with_members_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run" / "members" / "relu").mkdir(parents=True)
    (tmp_path / "run" / "members" / "relu" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"new folder but .* holds a run \(members\)"):
        run(tmp_path / "run", side_by_side(MEMBERS), HOOKS)


def test_a_hook_that_a_member_does_not_find_is_named_with_it(tmp_path: Path) -> None:
    members = [*MEMBERS, {**MEMBERS[1], "name": "other", "hook_name": "blocks.2.hook_resid_post"}]
    with pytest.raises(ValueError, match=r"Member `other`: Expected `hook_name` to be one of"):
        run(tmp_path / "run", side_by_side(members), HOOKS)
    assert not (tmp_path / "run").exists()


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(root: Path, members: list[dict[str, Any]], ckpt_path: Path | None = None) -> SideBySide:
    data = ActivationDataModule(HOOKS, **DATA)  # type: ignore[arg-type]
    model = SideBySide(members, d_in=data.d_in)
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[SaveAt(4, root / "at-4.ckpt"), RunCheckpoint()],
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    resampling = {
        "class_path": "lightning_sae.callbacks.DeadFeatureResampling",
        "init_args": {"every_n_steps": 3, "n_inputs": 128},
    }
    members = [{**MEMBERS[0], "callbacks": [*CALLBACKS, resampling]}, MEMBERS[1]]
    whole = fit(tmp_path / "whole", members)
    resumed = fit(tmp_path / "resumed", members, tmp_path / "whole" / "at-4.ckpt")
    weights = resumed.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in whole.state_dict().items())
    for one, other in zip(whole.members, resumed.members, strict=True):
        moments, others = (m.optimizer.state_dict()["state"] for m in (one, other))
        assert all(
            torch.equal(value, others[i][name])
            for i, state in moments.items()
            for name, value in state.items()
        )
    with pytest.raises(ValueError, match="Expected a checkpoint of the members topk, relu-"):
        fit(tmp_path / "other", members[::-1], tmp_path / "whole" / "at-4.ckpt")


def test_the_language_model_runs_as_often_for_many_members_as_for_one(tmp_path: Path) -> None:
    passes: dict[int, list[torch.Size]] = {}
    for members in (MEMBERS[1:], MEMBERS):
        data = ActivationDataModule(HOOKS, **{**DATA, "prefetch": False})  # type: ignore[arg-type]
        model = SideBySide(members, d_in=data.d_in)
        seen = passes.setdefault(len(model.members), [])
        data.language_model.network.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].shape)
        )
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        flags: dict[str, Any] = dict.fromkeys(off, False)
        trainer = Trainer(accelerator="cpu", max_steps=8, limit_val_batches=0, **flags)
        trainer.fit(model, datamodule=data)
    assert len(passes[5]) == len(passes[1]) > 3


def test_rows_of_all_hooks_are_of_the_same_tokens() -> None:
    """Seen on a copy of a hook under another name: the input of a block and the output before."""
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    data = ActivationDataModule(hooks, **DATA)  # type: ignore[arg-type]
    batch: dict[str, Tensor] = next(iter(data.train_dataloader()))
    assert torch.equal(batch[hooks[0]], batch[hooks[1]])
    data.teardown("fit")
