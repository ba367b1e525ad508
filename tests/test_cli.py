import json
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_sae
from lightning_sae import ActivationDataModule, ReLUSAE
from lightning_sae.checks import of_ours
from lightning_sae.cli import command, main

SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=6",
    "--trainer.val_check_interval=3",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.log_every_n_steps=2",
    "--trainer.enable_model_summary=false",
    "--model=lightning_sae.ReLUSAE",
    "--model.d_sae=256",
    "--data=lightning_sae.ActivationDataModule",
    "--data.hook_name=blocks.1.hook_resid_post",
    "--data.context_length=32",
    "--data.blocks_per_pass=8",
    "--data.batch_size=128",
    "--data.buffer_size=512",
    "--data.n_validation=512",
    "--data.n_test=512",
    "--evaluation.n_tokens=512",
]
PROJECTION = "--trainer.callbacks=lightning_sae.callbacks.DecoderNormProjection"
CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").rglob("*.yaml"))
SMALL_CONFIGS = [path for path in CONFIGS if path.parent.name == "configs"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on the embedded model, fitted and tested."""
    root = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-sae"])
        main(["fit", *SMALL, PROJECTION, f"--trainer.default_root_dir={root}"])
        main(
            [
                "test",
                f"--config={root}/config.yaml",
                f"--ckpt_path={root}/checkpoints/last.ckpt",
            ]
        )
    return root


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    assert {"sae", "checkpoints", "tensorboard", "results.json", "config.yaml"} == {
        path.name for path in run.iterdir()
    }
    sae = lightning_sae.load(run / "sae")
    assert (sae.d_in, sae.d_sae) == (128, 256)  # d_in was read from the model
    assert sae.source["hook_name"] == "blocks.1.hook_resid_post"
    assert sae.source["model"] == "embedded"


def test_results_hold_every_figure(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    expected = (
        "l0 mse fvu explained_variance l2_ratio relative_reconstruction_bias cosine_similarity "
        "dead_fraction frequency_below_1e-5 frequency_below_1e-4 ce_clean ce_spliced "
        "ce_zero_ablation ce_mean_ablation loss_recovered_zero loss_recovered_mean "
        "perplexity_clean perplexity_spliced kl n_tokens"
    )
    assert set(expected.split()) <= results.keys()
    assert all(isinstance(value, int | float) for value in results.values())
    assert results["fvu"] == pytest.approx(1 - results["explained_variance"], abs=1e-6)
    assert results["ce_clean"] < results["ce_spliced"] < results["ce_zero_ablation"]


def test_tensorboard_gets_curves_histograms_and_hyperparameters(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), {"histograms": 0}).Reload()
    scalars, histograms = set(events.Tags()["scalars"]), set(events.Tags()["histograms"])
    assert {"train/loss", "train/l0", "train/dead", "val/fvu", "val/l0"} <= scalars
    assert {
        "latents/log10_frequency",
        "latents/encoder_decoder_cosine",
        "latents/decoder_norm",
        "latents/encoder_bias",
    } <= histograms
    assert [event.step for event in events.Histograms("latents/decoder_norm")] == [3, 6]
    norms = events.Histograms("latents/decoder_norm")[-1].histogram_value
    assert norms.num == 256
    assert norms.min == pytest.approx(1, abs=1e-5)
    assert "d_sae: 256" in (run / "tensorboard" / "hparams.yaml").read_text()


def test_the_exported_sae_is_the_trained_one(run: Path) -> None:
    x = torch.randn(9, 128)
    exported = lightning_sae.load(run / "sae")
    trained = lightning_sae.load(run / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(exported.encode(x), trained.encode(x))


def test_testing_again_keeps_the_earlier_results(run: Path, capsys: Any) -> None:
    before = (run / "results.json").read_bytes()
    arguments = [f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"]
    main(["test", *arguments])
    assert (run / "results.json").read_bytes() == before
    again = json.loads((run / "results-2.json").read_text())
    assert again == json.loads(before)
    assert f"Made: {run}/results-2.json" in capsys.readouterr().out
    (run / "results-2.json").unlink()


def test_validate_works_from_the_same_config(run: Path) -> None:
    arguments = [f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"]
    assert main(["validate", *arguments]).trainer.callback_metrics["val/l0"] > 0


@pytest.mark.parametrize("command_name", ["test", "validate", "predict"])
def test_weights_that_were_not_trained_are_not_evaluated(run: Path, command_name: str) -> None:
    with pytest.raises(ValueError, match=r"`ckpt_path` to be a checkpoint file but got None"):
        main([command_name, f"--config={run}/config.yaml"])


def test_a_resumed_run_keeps_both_configurations(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    last = f"--ckpt_path={root}/checkpoints/last.ckpt"
    config = f"--config={run}/config.yaml"
    main(["fit", config, f"--trainer.default_root_dir={root}", "--trainer.max_steps=7", last])
    assert "max_steps: 6" in (root / "config.yaml").read_text()
    assert "max_steps: 7" in (root / "config-2.yaml").read_text()
    assert (root / "sae-2" / "config.json").is_file()


def test_bars_and_checkpoints_can_be_switched_off(tmp_path: Path) -> None:
    off = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    main(["fit", *SMALL, PROJECTION, *off, f"--trainer.default_root_dir={tmp_path}/run"])
    assert (tmp_path / "run" / "sae").is_dir()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_predict_writes_the_latents(run: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"]
    cli = main(["predict", *arguments, f"--trainer.default_root_dir={tmp_path}/out"])
    assert f"Made: {tmp_path}/out/latents" in capsys.readouterr().out
    files = sorted((tmp_path / "out" / "latents").iterdir())
    batches = list(cli.datamodule.predict_dataloader())
    assert len(files) == len(batches) > 1
    for file, batch in zip(files, batches, strict=True):
        rows, f = load_file(file), cli.model.encode(batch)
        assert rows["d_sae"] == 256
        for i, (start, end) in enumerate(pairwise(rows["starts"].tolist())):
            dense = torch.zeros(256)
            dense[rows["latents"][start:end]] = rows["values"][start:end]
            torch.testing.assert_close(dense, f[i])


def test_a_run_in_the_folder_of_another_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    arguments = ["fit", *SMALL, PROJECTION, f"--trainer.default_root_dir={run}"]
    monkeypatch.setattr(sys, "argv", ["lightning-sae", *arguments])
    with pytest.raises(SystemExit, match=r"lightning-sae: ValueError: .*is not overwritten"):
        command()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    """Not a folder, and in a folder that was there only what was there."""
    own = tmp_path / "own"
    (own / "tensorboard").mkdir(parents=True)
    (own / "tensorboard" / "events.out.tfevents.1").write_bytes(b"mine")
    for root in (tmp_path / "new", own):
        with pytest.raises(ValueError, match="lr_decay_steps"):
            main(
                ["fit", *SMALL, f"--trainer.default_root_dir={root}", "--model.lr_decay_steps=999"]
            )
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [Path("own/tensorboard/events.out.tfevents.1")]
    assert not (tmp_path / "new").exists()


def test_a_finished_run_can_be_prolonged(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    root = tmp_path / "longer"
    main(
        [
            "fit",
            *SMALL,
            PROJECTION,
            f"--trainer.default_root_dir={root}",
            "--trainer.max_steps=8",
            f"--ckpt_path={last}",
        ]
    )
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


class MySAE(ReLUSAE):
    """A user's architecture.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        sharpness: The user's own argument.
        kwargs: Arguments of `ReLUSAE`.
    """

    def __init__(self, d_in: int, d_sae: int, sharpness: float = 2.0, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.sharpness = sharpness


class MyData(ActivationDataModule):
    """A user's data."""


def test_every_part_can_be_a_users_own() -> None:
    arguments = [argument for argument in SMALL if not argument.startswith(("--model=", "--data="))]
    cli = main(
        [
            f"--model={__name__}.MySAE",
            f"--data={__name__}.MyData",
            *arguments,
            "--model.sharpness=3",
            "--model.l1_coefficient=0.5",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            "--trainer.logger.save_dir=logs",
        ],
        run=False,
    )
    assert isinstance(cli.model, MySAE)
    assert (cli.model.sharpness, cli.model.l1_coefficient) == (3.0, 0.5)
    assert isinstance(cli.datamodule, MyData)
    assert type(cli.trainer.logger).__name__ == "CSVLogger"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed and built, but for models that only the hub has."""
    monkeypatch.setattr(ActivationDataModule, "d_in", 8)
    cli = main([f"--config={path}"], run=False)
    assert isinstance(cli.model, lightning_sae.SparseAutoencoder | lightning_sae.SideBySide)
    assert cli.trainer.max_steps > 0


@pytest.mark.parametrize("path", SMALL_CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_trains_a_step(path: Path, tmp_path: Path) -> None:
    """On the embedded model, with small sizes, and without callbacks' long schedules."""
    shrunk = [a for a in SMALL if not a.startswith(("--model", "--data=", "--data.hook"))]
    settings, smaller = path.read_text(), []
    if "members:" not in settings:  # which have hooks and sizes of their own
        smaller += ["--data.hook_name=blocks.0.hook_resid_post"]
        smaller += ["--model.lr_warmup_steps=0", "--model.lr_decay_steps=0"]
        smaller += [] if "prefixes:" in settings else ["--model.d_sae=64"]
    arguments = [
        "--data.model=embedded",
        "--data.text=embedded",
        "--data.streaming=false",
        *smaller,
        "--trainer.strategy=auto",  # more than one process would run the tests themselves
        "--trainer.devices=1",
        f"--trainer.default_root_dir={tmp_path}/run",
    ]
    # So long that all lengths fit, and ended after two batches.
    long = ["--trainer.max_steps=400000", "--trainer.val_check_interval=100000"]
    ended = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    cli = main(["fit", f"--config={path}", *shrunk, *arguments, *long, *ended])
    assert cli.trainer.global_step > 0


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command line prints for arguments that ask for help."""
    monkeypatch.setenv("COLUMNS", "200")

    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["fit", *arguments])
        return capsys.readouterr().out

    return shown


def test_a_configuration_may_come_before_the_subcommand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text("fit:\n  trainer:\n    max_steps: 12345\ntest:\n  verbose: false\n")
    with pytest.raises(SystemExit):
        main([f"--config={path}", "fit", "--print_config"])
    assert "max_steps: 12345" in capsys.readouterr().out


def test_help_documents_arguments_from_the_docstrings(help_of: Any) -> None:
    shown = help_of("--model.help=lightning_sae.ReLUSAE")
    for line in (
        "Weight lambda of the penalty",
        "Peak learning rate of Adam",
        "gradient is clipped",
    ):
        assert line in shown


def test_help_of_the_data_lists_no_layers_of_torch(help_of: Any) -> None:
    shown = help_of("--data.help", "lightning_sae.ActivationDataModule")
    assert "--data.model MODEL" in shown
    assert "torch.nn" not in shown


def test_help_lists_the_models_that_a_user_can_choose_and_no_others(help_of: Any) -> None:
    import lightning_sae

    _, listed = help_of("--help").split("Union[SparseAutoencoder, SideBySide, null]")
    listed, _ = listed.split(")", 1)
    found = {name.strip() for name in listed.split("known subclasses:")[1].split(",")}
    kinds = {name for name in lightning_sae.__all__ if name.endswith("SAE")} | {"SideBySide"}
    assert {name for name in found if name.startswith("lightning_sae.")} == {
        f"lightning_sae.{name}" for name in kinds
    }


def test_help_lists_the_data_that_a_user_can_choose_and_no_parts_of_it(help_of: Any) -> None:
    import lightning_sae

    listed = help_of("--help").split("known subclasses: lightning.LightningDataModule,")[1]
    found = {name.strip() for name in listed.split(")", 1)[0].split(",")}
    assert "lightning_sae.CachedDataModule" in found
    named = {name for name in found if name.startswith("lightning_sae.")}
    assert named <= {f"lightning_sae.{name}" for name in lightning_sae.__all__}


BAD_INPUT = {
    "--data.hook_name=blocks.1.hook_resid_pots": "similar ones are: blocks.1.hook_resid_post",
    "--data.hook_name=blocks.7.hook_resid_post": "a layer from 0 to 2 but got",
    "--data.model=./no/such/folder": "there is no folder",
    "--data.model=some-org/some-model": "the hub did not give it",
    "--data.text=./no/such/file.txt": "to name files but there is none",
    "--data.context_length=100000": "to be at most 256, the context of the model",
    "--data.batch_size=1024": "between 1 and `buffer_size`=512",
    "--trainer.max_steps=-1": "set `trainer.max_steps`",
    "--model.lr=0": "`lr` to be positive",
    "--trainer.callbacks+=lightning_sae.callbacks.LatentFigures": "to have one `LatentFigures` but",
    "--ckpt_path=missing.ckpt": "missing.ckpt",
}


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set:UserWarning")
@pytest.mark.parametrize(("argument", "message"), BAD_INPUT.items())
def test_bad_input_ends_with_one_line_before_anything_is_written(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-sae", "fit", *SMALL, PROJECTION, argument])
    with pytest.raises(SystemExit) as stopped:
        command()
    assert message in f"{stopped.value}{capsys.readouterr().err}"
    assert not list(Path("runs").rglob("*.ckpt"))
    assert not list(Path("runs").rglob("config.yaml"))


def test_all_bad_arguments_are_named_at_once() -> None:
    bad = {"data.batch_size": 1024, "data.refill_fraction": 2, "model.lr": -1, "model.k": 0}
    words = [f"--{name}={value}" for name, value in bad.items()]
    with pytest.raises(ValueError, match="batch_size") as refused:
        main(["fit", *SMALL, "--model=TopKSAE", "--model.d_sae=256", *words])
    lines = str(refused.value).splitlines()
    assert len(lines) == len(bad)
    assert all(f"`{name.split('.')[1]}`" in line for name, line in zip(bad, lines, strict=True))


def refused(*words: str) -> list[str]:
    """The lines of the message with which `fit` refuses these arguments."""
    with pytest.raises(ValueError, match="Expected") as error:
        main(["fit", *SMALL, *words])
    return str(of_ours(error.value)).splitlines()


def test_bad_arguments_are_named_with_lengths_and_text_that_a_run_would_refuse() -> None:
    lengths = ["--trainer.max_steps=5", "--model.lr_warmup_steps=4", "--model.lr_decay_steps=4"]
    lines = refused("--model.lr=-1", *lengths, "--data.text=nowhere.txt")
    for line, name in zip(lines, ("lr", "lr_warmup_steps", "text"), strict=True):
        assert f"`{name}`" in line


def test_bad_arguments_of_an_sae_are_named_with_a_model_or_hook_that_is_not_there() -> None:
    for bad in "--data.model=/nowhere/at/all", "--data.hook_name=blocks.9.hook_resid_post":
        lines = refused(bad, "--model.d_sae=0", "--model.lr=-1", "--data.text=nowhere.txt")
        for line, name in zip(lines, (bad[7:].split("=")[0], "text", "d_sae", "lr"), strict=True):
            assert f"`{name}`" in line


def test_several_hooks_for_a_single_sae_are_refused_by_name() -> None:
    hooks = "--data.hook_name=[blocks.0.hook_resid_post,blocks.1.hook_resid_post]"
    (line,) = refused(hooks)
    assert "`hook_name` to be one hook, for ReLUSAE is a single SAE" in line


def test_bad_arguments_of_a_member_are_named_with_those_of_the_data(tmp_path: Path) -> None:
    sae = {"class_path": "TopKSAE", "init_args": {"d_sae": 16, "k": 0, "lr": -1}}
    members = {"class_path": "SideBySide", "init_args": {"members": [{"name": "a", "sae": sae}]}}
    data = {"class_path": "ToyDataModule", "init_args": {"n_features": 8, "d_in": 8}}
    for bad, n in ({}, 2), ({"batch_size": 0}, 3):
        data["init_args"] |= bad  # type: ignore[operator]
        run = {"trainer": {"max_steps": 5}, "model": members, "data": data}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        with pytest.raises(ValueError, match="`lr`.*\n.*`k`") as refused:
            main(["fit", f"--config={tmp_path}/run.yaml"])
        assert len(str(of_ours(refused.value)).splitlines()) == n


def test_seed_is_fixed_unless_the_user_sets_one() -> None:
    weights = []
    for seed in (0, 0, 1):
        seed_everything(seed)
        weights.append(main([*SMALL, f"--seed_everything={seed}"], run=False).model.W_dec)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_run_that_was_moved_writes_where_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "my run [1]"
    shutil.copytree(run, root)
    before = {path.name for path in run.iterdir()}
    last = f"--ckpt_path={root}/checkpoints/last.ckpt"
    main(["test", f"--config={root}/config.yaml", last])
    assert f"The run's folder is {root}, not {run} as it was." in capsys.readouterr().out
    assert (root / "results-2.json").is_file()
    main(["fit", f"--config={root}/config.yaml", last, "--trainer.max_steps=7"])
    written = yaml.safe_load((root / "config-2.yaml").read_text())
    assert written["trainer"]["default_root_dir"] == str(root)
    assert {path.name for path in run.iterdir()} == before
    (printed,) = (line for line in capsys.readouterr().out.splitlines() if "sae test" in line)
    expected = ["--config", f"{root}/config-2.yaml", "--ckpt_path", f"{root}/checkpoints/last.ckpt"]
    assert shlex.split(printed) == ["lightning-sae", "test", *expected]


def test_a_run_without_a_checkpoint_starts_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    arguments = ["fit", *SMALL, PROJECTION, f"--trainer.default_root_dir={root}"]
    missing = f"--ckpt_path={root}/checkpoints/last.ckpt"
    (root / "checkpoints").mkdir(parents=True)
    (root / "tensorboard").mkdir()
    (root / "config.yaml").write_text("mine")
    (root / "checkpoints" / ".last.ckpt.abcd1234").write_bytes(b"half")
    with pytest.raises(ValueError, match="`fit` without `--ckpt_path` starts a new run"):
        main([*arguments, missing])
    main([*arguments, "--trainer.max_steps=3"])
    assert (root / "config.yaml").read_text() == "mine"
    assert "max_steps: 3" in (root / "config-2.yaml").read_text()
    assert [path.name for path in (root / "checkpoints").iterdir()] == ["last.ckpt"]


def test_given_arguments_count_on_resume_and_are_written_down(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    again = ["fit", f"--config={root}/config.yaml", f"--ckpt_path={root}/checkpoints/last.ckpt"]
    before = sorted(path.name for path in root.iterdir())
    for argument, name in (
        ("--data.batch_size=64", "data.batch_size"),
        ("--seed_everything=5", "seed_everything"),
        ("--trainer.precision=bf16-mixed", "trainer.precision"),
        ("--data.hook_name=blocks.0.hook_resid_post", "hook_name"),
    ):
        with pytest.raises(ValueError, match=name):
            main([*again, argument])
        assert sorted(path.name for path in root.iterdir()) == before
    cli = main([*again, "--model.lr=0.0001", "--trainer.max_steps=7"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.0001
    assert "lr: 0.0001" in (root / "config-2.yaml").read_text()


def test_a_rank_that_never_came_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, also before the ranks have met."""
    error = torch.distributed.DistStoreError("Timed out after 9 seconds waiting for clients.")

    def fails() -> None:
        raise error

    monkeypatch.setattr("lightning_sae.cli.main", fails)
    monkeypatch.setattr("sys.argv", ["lightning-sae", "fit"])
    with pytest.raises(SystemExit, match=r"Another rank ended or cannot be reached.*9 seconds"):
        command()
    monkeypatch.setattr("lightning_sae.cli.main", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        command()
