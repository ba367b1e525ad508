"""What is damaged is named, and nothing of it is used in silence."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import lightning_sae
from benchmarks.damaged_files import RunsCode, trials
from lightning_sae import ReLUSAE, TopKSAE
from lightning_sae.checkpoints import read_checkpoint
from lightning_sae.checks import require_types
from lightning_sae.files import read_json
from lightning_sae.functional.penalties import Sqrt


def test_damaged_at_random_each_is_refused_in_one_line_or_as_it_was(tmp_path: Path) -> None:
    found = trials(72, 0, tmp_path)
    assert [outcome for outcome in found if not outcome.is_right] == []
    assert sum(outcome.how == "refused" for outcome in found) > 50


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """A run's checkpoint of two steps."""
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fitted(ReLUSAE(4, 64)).save_checkpoint(path)
    return path


def fitted(sae: Any, ckpt_path: Path | None = None, rows: Any = None, **options: Any) -> Trainer:
    """A trainer that has fitted on rows."""
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 2,
    }
    trainer = Trainer(**plain | options)
    rows = torch.randn(64, 4) if rows is None else rows
    trainer.fit(sae, DataLoader(rows, batch_size=16), ckpt_path=ckpt_path)
    return trainer


def damage(path: Path, name: str) -> None:
    """Change a byte of the checkpoint's tensor that belongs to the first entry of this name."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = torch.load(path, weights_only=True)[name]
    tensor = found["W_dec"] if name == "state_dict" else found[0]["state"][0]["exp_avg"]
    content = bytearray(path.read_bytes())
    content[tensor.untyped_storage()._checkpoint_offset + 9] ^= 4
    path.write_bytes(content)


def test_weights_are_read_from_a_checkpoint_that_is_damaged_elsewhere(last: Path) -> None:
    x = torch.randn(3, 4)
    before = lightning_sae.load(last).encode(x)
    damage(last, "optimizer_states")
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged in optimizer_states, which are"):
        assert torch.equal(lightning_sae.load(last).encode(x), before)
    with pytest.raises(ValueError, match=r"optimizer_states.*weights are intact: `lightning_sae"):
        fitted(ReLUSAE(4, 64), last)


def test_damaged_weights_are_refused(last: Path) -> None:
    damage(last, "state_dict")
    with pytest.raises(ValueError, match=r"last.ckpt.* damaged in state_dict.*: start over\.$"):
        lightning_sae.load(last)
    with pytest.raises(ValueError, match=r"last.ckpt.* damaged in state_dict"):
        fitted(ReLUSAE(4, 64), last)  # by Lightning's own reader it would train on


def test_what_can_be_used_instead_is_named(last: Path) -> None:
    last.write_bytes(last.read_bytes()[:1000])
    sae = ReLUSAE(4, 64).save_pretrained(last.parents[1] / "sae")
    with pytest.raises(ValueError, match=f"exported SAE is there for `lightning_sae.load`: {sae}"):
        read_checkpoint(last)
    (last.parent / "older.ckpt").write_text("damaged, too")
    torch.save({"state_dict": {}}, last.parent / "stopped.ckpt")
    with pytest.raises(ValueError, match=f"{last.parent / 'stopped.ckpt'} is intact"):
        read_checkpoint(last)


def test_a_record_that_says_it_is_a_folder_is_damage(last: Path) -> None:
    content = bytearray(last.read_bytes())
    entry = content.rindex(b"/data/3", 0, content.rindex(b"PK\x01\x02"))
    content[content.rindex(b"PK\x01\x02", 0, entry) + 38] |= 0x10  # of it torch reads nothing
    last.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged \(its table of contents is wrong\)"):
        read_checkpoint(last)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "extra": RunsCode(f"{tmp_path}/ran")}, path)
    with pytest.raises(ValueError, match="it holds .*, and only tensors and plain values are read"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    with zipfile.ZipFile(path) as archive:  # the file itself is sound
        assert archive.testzip() is None


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the contents of a checkpoint."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def without(name: str, *inner: str) -> Callable[[dict[str, Any]], None]:
    """Remove an entry of a checkpoint."""

    def change(content: dict[str, Any]) -> None:
        for key in (name, *inner)[:-1]:
            content = content[key]
        del content[(name, *inner)[-1]]

    return change


def having(**entries: Any) -> Callable[[dict[str, Any]], None]:
    """Replace entries of a checkpoint."""
    return lambda content: content.update(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("optimizer_states"), "lacks optimizer_states"),
        (having(optimizer_states=[]), "lacks optimizer_states"),
        (having(optimizer_states=[3]), "`optimizer_states.0`"),
        (without("lr_schedulers"), "lacks lr_schedulers"),
        (without("loops"), "lacks loops"),
        (without("loops", "fit_loop"), "`loops.fit_loop`"),
        (without("callbacks"), "lacks callbacks"),
        (having(callbacks={"X": 3}), "`callbacks.X`"),
        (without("state_dict"), "lacks state_dict"),
        (without("global_step"), "lacks global_step"),
        (having(global_step=-1), "`global_step` is -1"),
        (without("pytorch-lightning_version"), "lacks pytorch-lightning_version"),
        (having(settings=3), "`settings` is a int"),
        (having(lightning_sae={"architecture": "ReLUSAE", "source": 3}), "`source` is 3"),
        (lambda c: c["state_dict"].update(b_enc=torch.ones(64).long()), "of torch.int64"),
    ],
)
def test_a_checkpoint_that_lacks_what_a_run_needs_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, last: Path
) -> None:
    rewrite(last, change)
    with pytest.raises(ValueError, match=message):
        fitted(ReLUSAE(4, 64), last, max_steps=3)


def test_a_checkpoint_of_weights_alone_says_how_to_go_on_from_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    fitted(ReLUSAE(4, 64)).save_checkpoint(path, weights_only=True)
    with pytest.raises(ValueError, match=r"lacks optimizer_states.*lightning_sae\.load\("):
        fitted(ReLUSAE(4, 64), path, max_steps=3)
    fitted(lightning_sae.load(path).train())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["hyper_parameters"].update(d_sae=10**7), "d_sae, d_in"),
        (lambda c: c["hyper_parameters"].update(unknown=1), "give no ReLUSAE: .*'unknown'"),
        (lambda c: c["hyper_parameters"].update(dead_after="x"), "give no ReLUSAE"),
        (lambda c: c["hyper_parameters"].update(penalty={"class": "os.system"}), "penalty"),
        (without("hyper_parameters"), "lacks hyper_parameters"),
    ],
)
def test_load_from_checkpoint_reads_as_carefully(
    change: Callable[[dict[str, Any]], None], message: str, last: Path
) -> None:
    rewrite(last, change)
    with pytest.raises(ValueError, match=message):
        ReLUSAE.load_from_checkpoint(last)


def test_load_from_checkpoint_compares_checksums(last: Path) -> None:
    damage(last, "state_dict")
    with pytest.raises(ValueError, match=r"Could not read .*last\.ckpt"):
        ReLUSAE.load_from_checkpoint(last)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an SAE."""
    return TopKSAE(4, 64, k=8).save_pretrained(tmp_path / "sae")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description."""
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def forget_checksums(folder: Path) -> None:
    """Have the folder as an earlier version wrote it."""
    edit(folder, lambda content: content.pop("checksums"))


def test_what_was_changed_since_is_refused_until_checksums_are_deleted(folder: Path) -> None:
    edit(folder, lambda content: content["arguments"].update(k=9))
    with pytest.raises(ValueError, match=r"config.json: it is not what was .* delete `checksums`"):
        lightning_sae.load(folder)
    forget_checksums(folder)
    assert lightning_sae.load(folder, TopKSAE).k == 9


def test_one_bit_of_the_weights_is_noticed(folder: Path) -> None:
    content = bytearray((folder / "sae.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "sae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"sae.safetensors: it is not what was written"):
        lightning_sae.load(folder)


def test_without_checksums_weights_are_still_finite(folder: Path) -> None:
    weights = load_file(folder / "sae.safetensors")
    weights["b_enc"][2] = -torch.inf
    save_file(weights, folder / "sae.safetensors")
    forget_checksums(folder)
    with pytest.raises(ValueError, match=r"config.json: its weights are not finite \(b_enc\)"):
        lightning_sae.load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("d_sae", 10**9, r"d_sae=1000000000\).* the weights have \(64,"),
        ("d_in", -4, "`d_in` to be positive"),
        ("k", 10**9, "`k` to be above 0 and at most"),
        ("lr", "fast", "`lr` to be of type .*float"),
        ("lr", [1], "`lr` to be of type .*float"),
        ("apply_b_dec_to_input", "no", "`apply_b_dec_to_input` to be of type .*bool"),
        ("betas", [0.9], "`betas` to be of type tuple"),
        ("revive", "often", "`revive` to be of type .*auxk"),
        ("colour", 3, "unexpected keyword argument 'colour'"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: Any, message: str, folder: Path) -> None:
    edit(folder, lambda content: content["arguments"].update({name: value}))
    with pytest.raises(ValueError, match=f"config.json: (?s:.*){message}"):
        lightning_sae.load(folder)


@pytest.mark.parametrize("count", [-1, 1.5, True, "4096", None, [4096]])
def test_activations_seen_in_training_are_a_count(count: Any, folder: Path) -> None:
    edit(folder, lambda content: content.update(training={"activations": count}))
    with pytest.raises(ValueError, match=r"config.json: its `training.activations` is .* a count"):
        lightning_sae.load(folder)
    edit(folder, lambda content: content.update(training={"activations": 4096}))
    forget_checksums(folder)
    assert lightning_sae.load(folder).n_trained == 4096


def test_a_penalty_is_one_of_this_package(tmp_path: Path) -> None:
    folder = ReLUSAE(4, 6, penalty=Sqrt()).save_pretrained(tmp_path / "sae")
    edit(folder, lambda content: content["arguments"]["penalty"].update(class_path="os.system"))
    with pytest.raises(ValueError, match=r"config.json: .*Expected a penalty of this package"):
        lightning_sae.load(folder)
    edit(folder, lambda content: content["arguments"].update(penalty=3))
    with pytest.raises(ValueError, match=r"config.json: .*`penalty` to be a class but got 3"):
        lightning_sae.load(folder)


def test_types_are_those_that_a_class_and_its_bases_say() -> None:
    require_types(TopKSAE, {"k": 8.0, "betas": (0.9, 1), "k_aux": None, "unknown": object()})
    for wrong in ({"k": 8.5}, {"k": True}, {"betas": 0.9}, {"lr": [1]}, {"k_aux": "1"}):
        with pytest.raises(ValueError, match="to be of type"):
            require_types(TopKSAE, wrong)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\udcff", "[" * 10**5, '{"a": NaN}'])
def test_a_file_that_is_not_json_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"^Could not read [^\n]*results.json: [^\n]*$"):
        read_json(path)


def test_weights_keep_their_dtype_or_get_the_one_asked_for(folder: Path) -> None:
    assert lightning_sae.load(folder, dtype=torch.float64).W_enc.dtype == torch.float64
    short = lightning_sae.load(folder, dtype=torch.bfloat16)
    again = lightning_sae.load(short.save_pretrained(folder.parent / "short"), device="cpu")
    assert again.W_dec.dtype == again.b_enc.dtype == torch.bfloat16
    assert torch.equal(again.W_dec, short.W_dec)
    assert again.W_enc.stride() == short.W_enc.stride()
    x = torch.randn(3, 4)
    assert again(x).dtype == torch.bfloat16
    assert torch.equal(again(x), short(x))


def test_a_place_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="`dtype` to be one of"):
        lightning_sae.load(folder, dtype=torch.int32)
    with pytest.raises(ValueError, match="`device` to be one that this machine has but got xla"):
        lightning_sae.load(folder, device="xla")
