import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_sae
from lightning_sae import ReLUSAE
from lightning_sae.checkpoints import AtomicCheckpointIO, read_checkpoint
from lightning_sae.files import write_atomically, written_whole


@pytest.fixture
def sae() -> ReLUSAE:
    """An SAE with all weights random, scaled inputs and an origin."""
    sae = ReLUSAE(4, 6, 0.3, lr=0.01, betas=(0.5, 0.9), apply_b_dec_to_input=False)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    sae.input_mean.copy_(torch.randn(4))
    sae.input_scale.fill_(3.0)
    sae.source = {"model": "some/model", "hook_name": "blocks.0.hook_resid_post"}
    return sae


def test_a_saved_sae_acts_on_raw_activations_as_before(sae: ReLUSAE, tmp_path: Path) -> None:
    x = torch.randn(7, 4)
    loaded = lightning_sae.load(sae.save_pretrained(tmp_path / "sae"))
    assert isinstance(loaded, ReLUSAE)
    assert not loaded.training
    assert loaded.source == sae.source
    assert (loaded.l1_coefficient, tuple(loaded.betas)) == (0.3, (0.5, 0.9))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x))


def test_the_folder_holds_plain_tensors_and_json(sae: ReLUSAE, tmp_path: Path) -> None:
    folder = sae.save_pretrained(tmp_path / "sae")
    shapes = {name: tuple(w.shape) for name, w in load_file(folder / "sae.safetensors").items()}
    assert shapes == {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,)}
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "ReLUSAE"
    assert config["source"] == sae.source
    assert config["versions"]["lightning_sae"] == lightning_sae.__version__
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "sae.safetensors"]


def test_a_folder_with_files_is_not_overwritten(sae: ReLUSAE, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`folder` to be a new or empty folder"):
        sae.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["notes.txt"]


class MySAE(ReLUSAE):
    """A user's own architecture."""


def test_a_users_own_class_is_loaded_by_that_class(tmp_path: Path) -> None:
    folder = MySAE(4, 6).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"`MySAE.from_pretrained\(path\)`"):
        lightning_sae.load(folder)
    assert type(MySAE.from_pretrained(folder)) is MySAE
    with pytest.raises(ValueError, match="architecture `ReLUSAE` but the file holds `MySAE`"):
        ReLUSAE.from_pretrained(folder)


class ThresholdSAE(ReLUSAE):
    """Its latents do not scale with their pre-activations, so scaling cannot be folded."""

    def activate(self, pre: Tensor) -> Tensor:
        return torch.where(pre > 1.0, pre, 0.0)


def test_a_scaling_that_cannot_be_folded_is_kept(tmp_path: Path) -> None:
    sae, x = ThresholdSAE(4, 6), torch.randn(50, 4)
    sae.input_mean.copy_(torch.randn(4))
    sae.input_scale.fill_(3.0)
    loaded = ThresholdSAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    assert (sae.encode(x) > 0).any()


def test_files_can_be_read_by_others_as_usual(tmp_path: Path) -> None:
    folder = ReLUSAE(4, 6).save_pretrained(tmp_path / "sae")
    (tmp_path / "ordinary").touch()
    modes = {path.stat().st_mode for path in [*folder.iterdir(), tmp_path / "ordinary"]}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["missing", "missing.ckpt", "."])
def test_a_path_without_an_sae_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected argument `path` to be"):
        lightning_sae.load(tmp_path / name)


def test_weights_that_do_not_belong_are_refused(sae: ReLUSAE, tmp_path: Path) -> None:
    folder = sae.save_pretrained(tmp_path / "sae")
    config = json.loads((folder / "config.json").read_text())
    from safetensors.torch import save_file

    weights = load_file(folder / "sae.safetensors")
    del weights["b_enc"]
    save_file(weights, folder / "sae.safetensors")
    with pytest.raises(ValueError, match=r"lack \['b_enc'\]"):
        lightning_sae.load(folder)
    assert config["format"] == 1


def test_a_checkpoint_of_a_gpu_is_read_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = {"pytorch-lightning_version": "2.6.6"}
    saved = {"state_dict": {"w": torch.ones(2)}, "epoch": 0, "global_step": 0, **version}
    with monkeypatch.context() as patch:  # as if the weights were on a GPU
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        torch.save(saved, tmp_path / "of_gpu.ckpt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "of_gpu.ckpt")
    found = AtomicCheckpointIO().load_checkpoint(tmp_path / "of_gpu.ckpt")
    assert found["state_dict"]["w"].device.type == "cpu"


def test_a_checkpoint_loads_without_unpickling(tmp_path: Path) -> None:
    sae = ReLUSAE(4, 6, decoder_norm="free")
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(sae, DataLoader(torch.randn(32, 4), batch_size=16))  # type: ignore[arg-type]
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    x = torch.randn(3, 4)
    assert torch.equal(lightning_sae.load(path).encode(x), sae.encode(x))


@contextmanager
def full_disk() -> Iterator[None]:
    """Writing more than 2 kB to a file fails, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete checkpoint, made before the disk is full."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    return path


def test_the_old_checkpoint_survives_a_full_disk(checkpoint: Path) -> None:
    big = {"step": 2, "big": torch.zeros(10_000)}
    with pytest.raises(OSError, match=r"earlier last.ckpt is intact\. Free some"), full_disk():
        AtomicCheckpointIO().save_checkpoint(big, checkpoint)
    assert read_checkpoint(checkpoint) == {"step": 1}
    assert [p.name for p in checkpoint.parent.iterdir() if p.is_file()] == ["last.ckpt"]


def test_nothing_half_written_is_left_where_the_disk_fills(tmp_path: Path) -> None:
    sae = ReLUSAE(32, 64)
    with pytest.raises(OSError, match="nothing was written"), full_disk():
        sae.save_pretrained(tmp_path / "sae")
    assert not list(tmp_path.glob("*sae*"))


def test_a_failing_writer_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def test_a_new_folder_has_all_its_files_or_none(tmp_path: Path) -> None:
    root = tmp_path / "saes"
    folder, left = root / "sae", root / ".sae.unfinished-ab12"
    left.mkdir(parents=True)  # by a process that was killed
    (root / ".sae.notes").write_text("mine")
    with suppress(KeyError), written_whole(folder) as new:
        (new / "a").write_text("1")
        raise KeyError
    assert [path.name for path in root.iterdir()] == [".sae.notes"]
    with written_whole(folder) as new:
        (new / "a").write_text("1")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert folder.stat().st_mode == root.stat().st_mode


def test_an_empty_folder_is_filled_and_what_a_killed_process_left_does_not_count(
    sae: ReLUSAE, tmp_path: Path
) -> None:
    left = tmp_path / "sae" / ".unfinished-ab12"
    left.mkdir(parents=True)
    (left / "sae.safetensors").write_text("half")
    folder = sae.save_pretrained(tmp_path / "sae")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": None}, "`path` to be a path"),
        ({"path": 3}, "`path` to be a path"),
        ({"path": ["a"]}, "`path` to be a path"),
        ({"architecture": "ReLUSAE"}, "`architecture` to be a class of SAEs"),
        ({"architecture": torch.nn.Linear}, "`architecture` to be a class of SAEs"),
        ({"member": "a"}, "`member` to be None, for .* is of one SAE"),
        ({"device": []}, "`device` to be one that this machine has"),
    ],
)
def test_what_is_no_argument_is_named(
    arguments: dict[str, Any], said: str, sae: ReLUSAE, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"path": sae.save_pretrained(tmp_path / "sae"), **arguments}
    with pytest.raises(ValueError, match=said):
        lightning_sae.load(**given)
    if arguments.keys() == {"path"}:
        with pytest.raises(ValueError, match=said):
            ReLUSAE.from_pretrained(given["path"])


def test_a_member_is_read_from_a_checkpoint_without_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    weights = {f"saes.0.{name}": weight for name, weight in ReLUSAE(4, 6).state_dict().items()}
    its = {"architecture": "ReLUSAE", "source": {}}
    own: dict[str, Any] = {
        "name": "a",
        "lightning_sae": its,
        "hyper_parameters": {"d_in": 4, "d_sae": 6},
    }
    for other in ("saes.1.W_dec", "W_dec"):
        too_many = {**weights, other: torch.ones(3)}
        torch.save({"state_dict": too_many, "members": [own]}, path)
        with pytest.raises(ValueError, match=f"last.ckpt: beside .* a it has {other}, which are"):
            lightning_sae.load(path, member="a")
    torch.save({"state_dict": weights, "members": [own]}, path)
    assert torch.equal(lightning_sae.load(path, member="a").W_dec, weights["saes.0.W_dec"])


def test_a_member_is_refused_for_a_checkpoint_of_one_sae(sae: ReLUSAE, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(sae)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"`member` to be None, for .*one\.ckpt is of one SAE"):
        lightning_sae.load(tmp_path / "one.ckpt", member="a")


def test_tensors_without_values_are_named(sae: ReLUSAE, tmp_path: Path) -> None:
    with torch.device("meta"):
        x, f, absent = torch.ones(3, 4), torch.ones(3, 6), ReLUSAE(4, 6)
    for use in (lambda: sae.encode(x), lambda: sae(x), lambda: sae.decode(f)):
        with pytest.raises(ValueError, match="cpu, but got them on meta: give a tensor that has"):
            use()
    for step in (sae.training_step, sae.validation_step, sae.predict_step):
        with pytest.raises(
            ValueError, match="a batch with values but got one on the device `meta`"
        ):
            step(x, 0)
    for use in (
        lambda: absent.encode(torch.ones(3, 4)),
        lambda: absent.training_step(torch.ones(3, 4), 0),
    ):
        with pytest.raises(ValueError, match="meta, but got them on cpu: build the SAE outside of"):
            use()
    with pytest.raises(ValueError, match="weights have no values"):
        absent.save_pretrained(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
