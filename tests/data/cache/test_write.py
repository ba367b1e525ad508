"""A cache has the rows of the stream, whenever and however often its writing was stopped."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_sae import ActivationDataModule, CachedDataModule, write_cache
from lightning_sae.data.cache import plan, shards, writer
from lightning_sae.data.cache import write as writing
from lightning_sae.data.cache.command import main
from lightning_sae.data.cache.manifest import read_manifest
from lightning_sae.data.cache.writer import write_part
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.stream import ActivationStream

HOOKS = ["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"]
SMALL: Any = {"tokens": 1000, "held_out": 300, "shard_bytes": 10_000}


@pytest.fixture
def make_data(text_file: Path, models: dict[str, Path]) -> Any:
    """A data module on the tiny Llama, in passes of 4 x 16 tokens."""

    def make(hook_name: Any = HOOKS[0], **arguments: Any) -> ActivationDataModule:
        settings = {
            "model": models["llama"],
            "text": text_file,
            "validation_fraction": 0.2,
            "context_length": 16,
            "blocks_per_pass": 4,
            "batch_size": 16,
            "buffer_size": 128,
            **arguments,
        }
        return ActivationDataModule(hook_name, **settings)

    return make


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, models: dict[str, Path]
) -> Path:
    """A cache of both hooks, in several shards."""
    folder = tmp_path_factory.mktemp("cache") / "both"
    common = {"validation_fraction": 0.2, "context_length": 16, "blocks_per_pass": 4}
    data = ActivationDataModule(HOOKS, models["llama"], text=text_file, **common)  # type: ignore[arg-type]
    return write_cache(data, folder, **SMALL)


def tensors(folder: Path, split: str) -> dict[str, Tensor]:
    """All rows of a split, read by safetensors alone."""
    files = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


def hashes(folder: Path) -> dict[str, list[Any]]:
    return json.loads((folder / "manifest.json").read_text())["shards"]


def stream(data: ActivationDataModule, n: int) -> Tensor:
    """The first rows of training, as the stream gives them."""
    read = ActivationStream(data.language_model, data.training_blocks(), data.filter, 4)
    rows = [read.read()]
    while sum(map(len, rows)) < n:
        rows.append(read.read())
    return torch.cat(rows)[:n]


def test_the_rows_are_those_of_the_stream_bit_for_bit(cache: Path, make_data: Any) -> None:
    manifest = read_manifest(cache)
    assert manifest.complete
    assert len(manifest.shards["training"]) > 3
    assert manifest.tokens["training"] == 1024
    found = tensors(cache, "training")
    for hook in HOOKS:
        assert torch.equal(found[hook], stream(make_data(hook), manifest.rows("training")))


def test_each_row_has_its_token_and_position(cache: Path, make_data: Any) -> None:
    data, found = make_data(), tensors(cache, "training")
    blocks, i = data.training_blocks(), 0
    special = set(data.special_tokens)
    for block in torch.cat([blocks.read(4) for _ in range(16)]):
        alone = data.language_model.activations(block.unsqueeze(0))[0]
        for position, token in enumerate(block.tolist()):
            if token not in special:
                assert found["tokens"][i] == token
                assert found["positions"][i] == position
                torch.testing.assert_close(found[HOOKS[0]][i], alone[position])
                i += 1
    assert i == len(found["tokens"])


def test_the_held_out_rows_are_those_of_validation_and_never_of_training(
    cache: Path, make_data: Any
) -> None:
    held_out, training = tensors(cache, "held_out"), tensors(cache, "training")
    expected = torch.cat(list(make_data(n_test=300).test_dataloader()))
    n = min(len(expected), len(held_out[HOOKS[0]]))
    assert n > 200
    assert torch.equal(held_out[HOOKS[0]][:n], expected[:n])
    of_training = {row.numpy().tobytes() for row in training[HOOKS[0]]}
    shared = sum(row.numpy().tobytes() in of_training for row in held_out[HOOKS[0]])
    assert shared < 0.1 * n  # the first tokens of documents may be the same


def test_the_manifest_says_what_the_rows_are(cache: Path, make_data: Any) -> None:
    manifest, rows = read_manifest(cache), tensors(cache, "training")
    data = make_data(HOOKS)
    assert manifest.source.items() >= data.source.items()
    assert manifest.data["seed"] == 0
    assert manifest.dtype == "float32"
    special = manifest.left_out["training"]["special_token"]
    assert manifest.rows("training") + special == manifest.tokens["training"]
    for hook in HOOKS:
        x, found = rows[hook].double(), manifest.statistics[hook]
        root = x.shape[1] ** 0.5
        torch.testing.assert_close(torch.tensor(found["mean"]).double(), x.mean(0))
        assert found["scale"] == pytest.approx(root / x.norm(dim=1).mean().item())
        centred = (x - x.mean(0)).norm(dim=1).mean().item()
        assert found["centered_scale"] == pytest.approx(root / centred)


class Killed(BaseException):
    pass


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ends the process, as far as a test can, in some forward pass, or in some write."""

    def arrange(passes: int | None = None, writes: int | None = None) -> None:
        left = Counter(passes=passes or 10**9, writes=writes or 10**9)

        def counted(name: str, call: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                left[name] -= 1
                if left[name] < 0:
                    raise Killed
                return call(*args, **kwargs)

            return wrapped

        monkeypatch.setattr(writer, "read_pass", counted("passes", ORIGINAL["read_pass"]))
        monkeypatch.setattr(shards, "save_file", counted("writes", ORIGINAL["save_file"]))

    return arrange


ORIGINAL = {"read_pass": writer.read_pass, "save_file": shards.save_file}


@pytest.mark.parametrize("kind", ["passes", "writes"])
def test_killed_and_started_again_it_writes_the_very_same_shards(
    cache: Path, make_data: Any, kill_after: Any, tmp_path: Path, kind: str
) -> None:
    folder, kills = tmp_path / "killed", 0
    for n in (3, 1, 5, 4, 7, 40):
        kill_after(**{kind: n})
        try:
            write_cache(make_data(HOOKS), folder, **SMALL)
            break
        except Killed:
            kills += 1
            if (folder / "manifest.json").exists():
                with pytest.raises(ValueError, match="is not complete"):
                    CachedDataModule(folder)
    assert kills >= 2
    assert hashes(folder) == hashes(cache)
    assert read_manifest(folder) == read_manifest(cache)
    assert not list(folder.glob(".*"))


def test_a_shard_that_came_to_be_before_its_record_is_written_again(
    cache: Path, make_data: Any, kill_after: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    kill_after(writes=4)
    with pytest.raises(Killed):
        write_cache(make_data(HOOKS), folder, **SMALL)
    there = len(list(folder.glob("training-*")))
    (folder / f"training-0-{there:05d}.safetensors").write_bytes(b"half of it")
    (folder / f".training-0-{there:05d}.safetensors.x").write_bytes(b"a quarter of it")
    kill_after()
    write_cache(make_data(HOOKS), folder, **SMALL)
    assert hashes(folder) == hashes(cache)
    assert not list(folder.glob(".*"))


def test_a_process_that_was_killed_in_its_first_write_left_nothing_in_the_way(
    cache: Path, make_data: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / ".manifest.json.ab12").write_text("{")
    write_cache(make_data(HOOKS), folder, **SMALL)
    assert hashes(folder) == hashes(cache)
    assert not list(folder.glob(".*"))
    (folder / ".manifest.json.cd34").write_text("{")  # or in the last one
    write_cache(make_data(HOOKS), folder, **SMALL)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passes": 3}, "it is not what was written"),
        ({"passes": "3"}, "it is damaged"),
        ({"shards": [{"file": "a"}]}, "it is damaged"),
        ({"state": [1]}, "it is damaged"),
        ({"colour": 1}, "it is damaged"),
    ],
)
def test_a_record_that_is_not_what_was_written_is_not_continued(
    change: dict[str, Any], said: str, cache: Path, make_data: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(cache, tmp_path / "own")
    record = json.loads((folder / "part-0.json").read_text())
    if said == "it is damaged":
        record.pop("checksum")
    record["training"] |= change
    (folder / "part-0.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"part-0.json: {said}"):
        write_cache(make_data(HOOKS), folder, **{**SMALL, "tokens": 2000})


def test_more_tokens_prolong_a_cache_and_fewer_end_one_that_was_stopped(
    cache: Path, make_data: Any, kill_after: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(cache, tmp_path / "longer")
    write_cache(make_data(HOOKS), folder, **{**SMALL, "tokens": 1100})
    longer, first = tensors(folder, "training"), tensors(cache, "training")
    n = len(first[HOOKS[0]])
    assert len(longer[HOOKS[0]]) > n
    for hook in HOOKS:
        assert torch.equal(longer[hook][:n], first[hook])
        assert torch.equal(longer[hook], stream(make_data(hook), len(longer[hook])))
    stopped = tmp_path / "stopped"
    kill_after(writes=4)
    with pytest.raises(Killed):
        write_cache(make_data(HOOKS), stopped, **SMALL)
    kill_after(passes=1)
    write_cache(make_data(HOOKS), stopped, **{**SMALL, "tokens": 64})
    assert 0 < read_manifest(stopped).rows("training") < n


def test_a_whole_text_is_read_once(make_data: Any, tmp_path: Path) -> None:
    folder = write_cache(make_data(), tmp_path / "whole")
    blocks, n = make_data().training_blocks(), 0
    while len(blocks.read_first_epoch(1)):
        n += 16
    assert read_manifest(folder).tokens["training"] == n == plan.tokens_of_text(make_data())
    before = (folder / "manifest.json").read_bytes()
    write_cache(make_data(), folder)  # there is nothing left to do
    assert (folder / "manifest.json").read_bytes() == before


def test_the_parts_of_two_ranks_are_the_streams_of_two_ranks(
    make_data: Any, tmp_path: Path
) -> None:
    data = make_data()
    passes: Any = {"held_out": 1, "training": 5}
    for part in (1, 0):  # in any order
        write_part(data, tmp_path, (part, 2), passes, 10_000, lambda n: None)
    for part in range(2):
        read = ActivationStream(
            data.language_model, data.training_blocks((part, 2)), data.filter, 4
        )
        found = tensors(tmp_path, f"training-{part}")
        assert torch.equal(found[HOOKS[0]], torch.cat([read.read() for _ in range(5)]))


def test_a_dtype_is_that_of_the_data(make_data: Any, tmp_path: Path) -> None:
    folder = write_cache(make_data(dtype="bfloat16"), tmp_path / "short", **SMALL)
    rows = tensors(folder, "training")[HOOKS[0]]
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, stream(make_data(), len(rows)).bfloat16())


def test_the_plan_is_about_right(make_data: Any, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "planned"
    write_cache(make_data(), folder, **SMALL, plan_only=True)
    said = capsys.readouterr().out
    assert not folder.exists()
    assert "tokens/s" in said
    tokens: Any = {"held_out": 300, "training": 1000}
    planned = plan.make_plan(make_data(), folder, tokens, 0, 1)
    manifest = read_manifest(write_cache(make_data(), folder, **SMALL))
    assert planned.rows["training"] == pytest.approx(manifest.rows("training"), rel=0.1)
    assert planned.nbytes == pytest.approx(manifest.nbytes(), rel=0.2)


# Bad input.


def test_a_disk_is_not_filled(
    make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=0, free=60_000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="no room for the cache.*rows fit"):
        write_cache(make_data(), tmp_path / "cache", **SMALL)
    assert not (tmp_path / "cache").exists()
    with monkeypatch.context() as patch:  # others fill it meanwhile
        patch.setattr(writing, "require_room", lambda plan: None)
        patch.setattr(
            shards, "free_bytes", lambda path: 20_000 - len(list(path.glob("tr*"))) * 9_000
        )
        with pytest.raises(OSError, match="nearly full.*same command"):
            write_cache(make_data(), tmp_path / "cache", **SMALL)
    usage.free = 2**40
    write_cache(make_data(), tmp_path / "cache", **SMALL)
    found = tensors(tmp_path / "cache", "training")[HOOKS[0]]
    assert torch.equal(found, stream(make_data(), len(found)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hook_name": HOOKS[0]}, "`hook_name` to be .* but got blocks.1"),
        ({"dtype": "float16"}, "`dtype` to be float32 but got float16"),
        ({"drop_special_tokens": False}, "`drop_special_tokens`"),
        ({"document_start": "none"}, "`document_start`"),
        ({"context_length": 8}, "`context_length` to be 16 but got 8"),
        ({"seed": 1}, "`seed`"),
        ({"model": "neox"}, "`model`"),
        ({"text": "other"}, "`text`"),
    ],
)
def test_a_cache_is_not_gone_on_with_as_another(
    cache: Path, make_data: Any, models: dict[str, Path], tmp_path: Path, changed: Any, said: str
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the cat " * 100)
    given = {"hook_name": HOOKS, **changed}
    given |= {"model": models["neox"]} if "model" in changed else {}
    given |= {"text": other} if "text" in changed else {}
    before = {path: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(ValueError, match=said):
        write_cache(make_data(**given), cache, **{**SMALL, "tokens": 3000})
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


def test_other_weights_under_the_same_name_are_noticed(
    cache: Path, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(HOOKS)
    with torch.no_grad():
        data.language_model.network.get_input_embeddings().weight.mul_(1.1)
    with pytest.raises(ValueError, match="gives other activations at"):
        write_cache(data, cache, **SMALL)


def test_one_process_at_a_time_writes_into_a_folder(make_data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with writing._held(folder), pytest.raises(ValueError, match="another process writes a cache"):
        write_cache(make_data(), folder, **SMALL)
    assert not folder.exists()


def test_what_was_not_made_by_it_is_not_written_into(make_data: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output` to be a new or empty folder"):
        write_cache(make_data(), tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] in (
        ["thesis.txt", "cwd"],
        ["cwd", "thesis.txt"],
    )


def test_activations_that_are_not_finite_end_it_at_once(
    make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations = LanguageModel.activations

    def broken(self: LanguageModel, tokens: Tensor) -> Tensor:
        found = activations(self, tokens)
        found[:, -1, 0] = torch.inf
        return found

    monkeypatch.setattr(LanguageModel, "activations", broken)
    with pytest.raises(ValueError, match="are not finite.*max_norm_multiple"):
        write_cache(make_data(), tmp_path / "cache", **SMALL)


def test_a_stream_of_unknown_length_needs_a_number(
    make_data: Any, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(documents * 100)

    monkeypatch.setattr(plan, "COUNTED_TOKENS", 100)
    with pytest.raises(ValueError, match="`tokens` to be a number"):
        write_cache(make_data(text=Stream()), tmp_path / "cache")


# The command.


def test_the_command_takes_a_runs_configuration(
    models: dict[str, Path], text_file: Path, tmp_path: Path, capsys: Any
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
seed_everything: 0
trainer: {{max_steps: 10, accelerator: cpu, devices: 1, callbacks: []}}
model: {{class_path: lightning_sae.TopKSAE, init_args: {{d_sae: 64}}}}
data:
  class_path: lightning_sae.ActivationDataModule
  init_args: {{hook_name: {HOOKS[0]}, model: {models["llama"]}, text: {text_file},
    context_length: 16, batch_size: 64}}
evaluation: {{n_tokens: 100}}
"""
    )
    folder = tmp_path / "cache"
    main(["--config", str(config), "--output", str(folder), "--tokens", "600", "--held_out", "64",
          "--data.dtype", "float16"])  # fmt: skip
    said = capsys.readouterr().out
    assert "rows  about" in said
    assert f"--data.activations {folder}" in said.splitlines()[-1]
    data = CachedDataModule(folder, batch_size=64)
    assert data.manifest is not None
    assert data.manifest.dtype == "float16"
    assert data.manifest.data["blocks_per_pass"] == 32


def test_data_that_no_model_reads_is_not_cached() -> None:
    Path("run.yaml").write_text("data: {class_path: lightning_sae.ToyDataModule}")
    with pytest.raises(ValueError, match="`config` to have data that a language model reads"):
        main(["--config", "run.yaml", "--output", "cache"])


def test_ctrl_c_says_how_to_go_on(
    models: dict[str, Path], text_file: Path, tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(writing, "write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = ["--data.hook_name", HOOKS[0], "--data.model", str(models["llama"])]
    given += ["--data.text", str(text_file), "--data.context_length", "16"]
    with pytest.raises(SystemExit) as ended:
        main(
            [*given, "--output", str(tmp_path / "cache"), "--tokens", "100", "--accelerator", "cpu"]
        )
    assert ended.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
