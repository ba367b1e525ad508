"""What is in a cache, or somebody else's file, trains an SAE: each row once, in random order."""

import copy
import inspect
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_sae import (
    ActivationDataModule,
    CachedDataModule,
    SideBySide,
    TopKSAE,
    load,
    write_cache,
)
from lightning_sae.callbacks import HeldOutEvaluation
from lightning_sae.cli import main as lightning_sae
from lightning_sae.data.cache import shuffled
from lightning_sae.data.cache.rows import Rows
from lightning_sae.data.cache.shuffled import Order, ShuffledRows
from lightning_sae.data.scaling import estimate_scaling
from lightning_sae.files import with_checksum

HOOKS = ["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"]
WIDTHS = {HOOKS[0]: 16, HOOKS[1]: 24}


class Recorder(LightningModule):
    """Keeps the batches it is given; its one weight learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches: list[Any] = []
        self.held_out: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.held_out.append(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(max_steps: int = 10, **arguments: Any) -> Trainer:
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    silent = dict.fromkeys(names, False)
    settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **silent, **arguments}
    return Trainer(accelerator="cpu", max_steps=max_steps, **settings)


def batches_of_a_fit(data: CachedDataModule, max_steps: int = 10, **arguments: Any) -> list[Any]:
    recorder = Recorder()
    trainer(max_steps).fit(recorder, data, **arguments)
    return recorder.batches


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, models: dict[str, Path]
) -> Path:
    """A cache of two hooks, in several shards."""
    folder = tmp_path_factory.mktemp("cache") / "both"
    common: Any = {"validation_fraction": 0.2, "context_length": 16, "blocks_per_pass": 4}
    data = ActivationDataModule(HOOKS, models["llama"], text=text_file, **common)
    return write_cache(data, folder, tokens=1000, held_out=500, shard_bytes=10_000)


@pytest.fixture
def rows(cache: Path) -> dict[str, dict[str, Tensor]]:
    """Its rows, read by safetensors alone."""
    found = {}
    for split in ("training", "held_out"):
        files = [load_file(path) for path in sorted(cache.glob(f"{split}-*.safetensors"))]
        found[split] = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    return found


def open_cache(folder: Path, **arguments: Any) -> CachedDataModule:
    return CachedDataModule(folder, **{"batch_size": 32, "buffer_size": 128, **arguments})


def numbered(n: int, *splits: int) -> Rows:
    """Rows that say which they are, in shards that end where `splits` say."""
    bounds = [0, *splits, n]
    column = torch.arange(n).float().unsqueeze(1)
    return Rows([{"x": column[a:b]} for a, b in pairwise(bounds)])


def places(batches: ShuffledRows, n: int) -> Tensor:
    return torch.cat([next(batches)["x"][:, 0] for _ in range(n)]).long()


# Order.


@pytest.mark.parametrize("together", [1, 7])
@pytest.mark.parametrize("prefetch", [True, False])
def test_in_each_pass_each_row_comes_once_in_an_order_of_its_own(
    together: int, prefetch: bool
) -> None:
    rows = numbered(120, 50, 51, 90)
    batches = ShuffledRows(rows, 8, 40, together, seed=0, prefetch=prefetch)
    passes = [places(batches, 15) for _ in range(3)]
    for each in passes:
        assert each.sort().values.equal(torch.arange(120))
    assert not passes[0].equal(passes[1])
    again = ShuffledRows(rows, 8, 40, together, seed=0, prefetch=not prefetch)
    assert places(again, 45).equal(torch.cat(passes))
    other = ShuffledRows(rows, 8, 40, together, seed=1, prefetch=prefetch)
    assert not places(other, 15).equal(passes[0])
    for opened in (batches, again, other):
        opened.close()


def test_rows_that_no_batch_divides_are_neither_left_out_nor_repeated() -> None:
    batches = ShuffledRows(numbered(50, 20), 8, 1000, 3, seed=0, prefetch=False)
    found = places(batches, 25)
    assert batches.passes == 4
    for start in range(0, 200, 50):
        assert found[start : start + 50].sort().values.equal(torch.arange(50))


def test_all_orders_are_equally_likely_where_rows_are_shuffled_singly() -> None:
    counts = torch.zeros(4, 4)
    for seed in range(2000):
        order = Order(4, 1, seed).between(0, 4)
        counts[torch.arange(4), order] += 1
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_a_window_has_pieces_from_anywhere() -> None:
    order = Order(10_000, 10, seed=0).between(2000, 3000)
    pieces = (order // 10).unique()
    assert len(pieces) == 100
    assert pieces.max() - pieces.min() > 900
    neighbours = (order[1:] - order[:-1]) == 1
    assert neighbours.float().mean() < 0.05


def test_several_ranks_share_each_pass() -> None:
    of_ranks = [
        ShuffledRows(numbered(96, 40), 4, 16, 5, 0, rank=rank, n_ranks=3, prefetch=False)
        for rank in range(3)
    ]
    found = torch.cat([places(batches, 8) for batches in of_ranks])
    assert found.sort().values.equal(torch.arange(96))


def test_pieces_are_of_a_size_that_a_disk_reads_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = numbered(1000)
    assert shuffled.rows_together(rows) == 1
    monkeypatch.setattr(shuffled, "SHUFFLED_SINGLY_BYTES", 3999)
    assert shuffled.rows_together(rows) == 2**16 // 4


def test_rows_are_taken_as_from_one_tensor() -> None:
    x = {name: torch.randn(60, width) for name, width in WIDTHS.items()}
    bounds = [0, 7, 7, 30, 60]
    rows = Rows([
        {name: part[a:b] for name, part in x.items()}
        for a, b in pairwise(bounds)
        if a < b
    ])  # fmt: skip
    index = torch.randint(60, (100,))
    for name, part in rows.take(index).items():
        assert part.equal(x[name][index])
    for start, stop in ((0, 60), (5, 8), (7, 30), (29, 90)):
        for name, part in rows.between(start, stop).all().items():
            assert part.equal(x[name][start:stop])


# Training.


def test_a_run_gets_the_rows_of_the_cache_and_no_model(cache: Path, rows: Any) -> None:
    n = len(rows["training"]["tokens"])
    data = open_cache(cache, hook_name=HOOKS[1])
    assert data.d_in == 24
    batches = batches_of_a_fit(data, 2 * n // 32 + 1)
    expected = rows["training"][HOOKS[1]]
    assert sorted(torch.cat(batches)[:n].tolist()) == sorted(expected.tolist())
    assert "language_model" not in vars(data)
    assert "_text_data" not in vars(data)


def test_rows_at_several_hooks_are_of_the_same_tokens(cache: Path, rows: Any) -> None:
    data = open_cache(cache)
    assert data.d_in == WIDTHS
    one, other = rows["training"][HOOKS[0]], rows["training"][HOOKS[1]]
    for batch in batches_of_a_fit(data, 3):
        place = (batch[HOOKS[0]].unsqueeze(1) == one).all(-1).int().argmax(1)
        assert batch[HOOKS[0]].equal(one[place])
        assert batch[HOOKS[1]].equal(other[place])


def test_validation_and_test_read_the_held_out_rows_in_order(cache: Path, rows: Any) -> None:
    expected = rows["held_out"][HOOKS[0]]
    data = open_cache(cache, hook_name=HOOKS[0], n_validation=100)
    recorder = Recorder()
    trainer(limit_val_batches=1.0).validate(recorder, data, verbose=False)
    assert torch.cat(recorder.held_out).equal(expected[:100])
    recorder = Recorder()
    trainer().test(recorder, data, verbose=False)
    assert torch.cat(recorder.held_out).equal(expected)


def test_a_run_goes_on_with_the_very_next_batch(cache: Path, tmp_path: Path) -> None:
    settings: Any = {"hook_name": HOOKS[0], "rows_together": 3}
    whole = batches_of_a_fit(open_cache(cache, **settings), 40)
    first, run = Recorder(), trainer(17)
    run.fit(first, open_cache(cache, **settings))
    run.save_checkpoint(tmp_path / "last.ckpt")
    elsewhere = shutil.copytree(cache, tmp_path / "moved")
    rest = batches_of_a_fit(open_cache(elsewhere, **settings), 40, ckpt_path=tmp_path / "last.ckpt")
    assert torch.cat([*first.batches, *rest]).equal(torch.cat(whole))
    with pytest.warns(UserWarning, match="another order"):
        batches_of_a_fit(
            open_cache(cache, **settings, batch_size=16), 20, ckpt_path=tmp_path / "last.ckpt"
        )


def test_a_copy_goes_on_where_the_data_stands(cache: Path) -> None:
    data = open_cache(cache, hook_name=HOOKS[0])
    batches = iter(data.train_dataloader())
    for _ in range(5):
        next(batches)
    other = iter(copy.deepcopy(data).train_dataloader())
    for _ in range(8):
        assert next(batches).equal(next(other))


def test_scaling_is_that_of_all_rows(cache: Path, rows: Any) -> None:
    x = rows["training"][HOOKS[0]]
    for center, scale in ((True, True), (False, True), (True, False)):
        data = open_cache(cache, hook_name=HOOKS[0], center=center, scale=scale)
        found, expected = data.scaling(), estimate_scaling(x, center, scale)
        assert found is not None
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.scale, expected.scale)
    assert open_cache(cache, hook_name=HOOKS[0], center=False, scale=False).scaling() is None


def test_defaults_are_those_of_the_stream() -> None:
    streamed, cached = (
        {name: given.default for name, given in inspect.signature(kind).parameters.items()}
        for kind in (ActivationDataModule, CachedDataModule)
    )
    shared = streamed.keys() & cached.keys() - {"hook_name"}  # which a cache names
    assert {"batch_size", "buffer_size", "center", "scale", "n_test", "seed"} <= shared
    assert {name: cached[name] for name in shared} == {name: streamed[name] for name in shared}


def test_saes_side_by_side_train_each_at_its_hook(cache: Path) -> None:
    part = {"class_path": "lightning_sae.TopKSAE", "init_args": {"d_sae": 64, "k": 4}}
    data = open_cache(cache)
    together = SideBySide(
        [{"name": hook[7:8], "hook_name": hook, "sae": part, "seed": 0} for hook in HOOKS],
        data.d_in,
    )
    trainer(5).fit(together, data)
    assert "_text_data" not in vars(data)  # nobody asked for the model
    for hook in HOOKS:
        torch.manual_seed(0)
        alone = TopKSAE(WIDTHS[hook], 64, k=4)
        trainer(5).fit(alone, open_cache(cache, hook_name=hook))
        member = together[hook[7:8]]
        assert member.source == alone.source
        assert member.W_dec.equal(alone.W_dec)


# What needs the model.


def test_a_test_finds_the_model_by_the_manifest(
    cache: Path, tmp_path: Path, text_file: Path, models: dict[str, Path]
) -> None:
    sae = TopKSAE(16, 64, k=4)
    evaluation = HeldOutEvaluation(n_tokens=256)
    run = trainer(3, callbacks=[evaluation], default_root_dir=tmp_path / "cached")
    data = open_cache(cache, hook_name=HOOKS[0])
    run.fit(sae, data)
    run.test(sae, data, verbose=False)
    found = dict(evaluation.results)
    stream = ActivationDataModule(
        HOOKS[0], models["llama"], text=text_file, validation_fraction=0.2, context_length=16,
        blocks_per_pass=4, batch_size=16, buffer_size=128,
    )  # fmt: skip
    trainer(callbacks=[evaluation], default_root_dir=tmp_path).test(sae, stream, verbose=False)
    for name in ("ce_clean", "ce_spliced", "loss_recovered_mean", "kl"):
        assert found[name] == evaluation.results[name]
    assert sae.source["model"] == str(models["llama"])
    assert sae.source["hook_name"] == HOOKS[0]


def test_each_hook_has_the_model_at_that_hook(cache: Path) -> None:
    data = open_cache(cache)
    whole = data.text_data()
    assert whole is not None
    for hook in HOOKS:
        one = data.at(hook).text_data()
        assert one is not None
        assert one.hook_name == hook
        assert one.d_in == WIDTHS[hook]
        assert one.language_model.network is whole.language_model.network


def test_without_the_model_a_test_gives_the_rest_and_says_so(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(cache, tmp_path / "moved")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["model"] = str(tmp_path / "gone")
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    evaluation = HeldOutEvaluation(n_tokens=256)
    run = trainer(3, callbacks=[evaluation], default_root_dir=tmp_path)
    data = open_cache(folder, hook_name=HOOKS[0])
    sae = TopKSAE(16, 64, k=4)
    run.fit(sae, data)
    run.test(sae, data, verbose=False)
    assert "fvu" in evaluation.results
    assert "ce_clean" not in evaluation.results
    assert "there is no folder" in caplog.text


def test_another_model_than_that_of_the_cache_is_refused(
    cache: Path, models: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="gives other activations at"):
        open_cache(cache, hook_name=HOOKS[0], evaluation_model=models["neox"]).text_data()


# Bad input.


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged."""
    return shutil.copytree(cache, tmp_path / "own")


def test_an_altered_shard_is_named_with_its_hash(own: Path) -> None:
    path = own / "training-0-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    data = open_cache(own, hook_name=HOOKS[0])
    assert data.manifest is not None
    sha256 = data.manifest.shards["training"][2].sha256
    with pytest.raises(ValueError, match=f"{path.name} is altered.*was written as {sha256}"):
        trainer().fit(Recorder(), data)
    batches_of_a_fit(open_cache(own, hook_name=HOOKS[0], verify=False), 2)


def test_a_shard_that_is_cut_short_missing_or_of_another_cache_is_named(own: Path) -> None:
    path = own / "training-0-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{path.name} of SHA-256 .* bytes, not"):
        open_cache(own)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} of SHA-256 .* is missing"):
        open_cache(own)
    (own / "manifest.json").rename(own / "gone.json")
    with pytest.raises(ValueError, match="has no manifest.json"):
        open_cache(own)
    (own / "gone.json").rename(own / "manifest.json")
    save_file({HOOKS[0]: torch.zeros(3, 16)}, path)
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["shards"]["training"][1]["nbytes"] = path.stat().st_size
    (own / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    with pytest.raises(ValueError, match="to hold float32 of shape .* but it holds"):
        open_cache(own)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ('{"format": "another"}', "does not describe a cache"),
        ('{"format": "lightning-sae activation cache", "version": 9}', "version 9"),
        ('{"format": "lightning-sae activation cache", "version": 1}', "it is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(own: Path, content: str, said: str) -> None:
    (own / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"manifest.json: .*{said}"):
        open_cache(own)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hook_name": "blocks.2.hook_resid_post"}, "`hook_name` to be one of blocks.1.*, which"),
        ({"batch_size": 100_000, "buffer_size": 100_000}, "`batch_size` to be at most"),
        ({"batch_size": 256, "buffer_size": 128}, "`buffer_size` to be at least `batch_size`"),
        ({"rows_together": 0}, "`rows_together` to be positive"),
    ],
)
def test_what_does_not_fit_the_cache_is_refused(cache: Path, arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_cache(cache, **arguments)


def test_a_cache_given_as_text_is_pointed_to_the_data_module(
    cache: Path, models: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="is a cache of activations: .*CachedDataModule"):
        ActivationDataModule(HOOKS[0], models["llama"], text=cache).training_blocks()


# Activations that somebody else has.


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str, Any]:
    """The same rows in every form."""
    x = torch.randn(5, 80, 12)
    flat = x.flatten(0, 1)
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"acts": flat}, tmp_path / "x.safetensors")
    (tmp_path / "parts").mkdir()
    (tmp_path / "shards").mkdir()
    for i, part in enumerate(flat.split(170)):
        save_file({"acts": part.clone()}, tmp_path / "shards" / f"{i}.safetensors")
    for i, part in enumerate(flat.split(150)):
        np.save(tmp_path / "parts" / f"{i}.npy", part.numpy())
    parts = [str(tmp_path / "parts" / f"{i}.npy") for i in range(3)]
    return {
        "tensor": x,
        "array": x.numpy(),
        "dictionary": {"any": x},
        "npy": tmp_path / "x.npy",
        "safetensors": str(tmp_path / "x.safetensors"),
        "list": parts,
        "folder of arrays": tmp_path / "parts",
        "folder of safetensors": tmp_path / "shards",
    }


def test_all_forms_train_alike_and_keep_the_last_rows_apart(theirs: Any) -> None:
    x = theirs["tensor"].flatten(0, 1)
    weights = []
    for form in theirs.values():
        torch.manual_seed(0)
        data = CachedDataModule(form, batch_size=64)
        sae = TopKSAE(d_in=data.d_in, d_sae=32, k=4)
        trainer(8, limit_val_batches=1.0, val_check_interval=8, check_val_every_n_epoch=None).fit(
            sae, data
        )
        weights.append(sae.W_dec.detach())
        assert torch.cat(list(data.val_dataloader())).equal(x[360:])
        assert len(data.rows("training")) == 360
    assert all(torch.equal(weights[0], each) for each in weights)


def test_short_dtypes_are_read_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(100, 8).bfloat16()
    save_file({"x": x}, tmp_path / "x.safetensors")
    data = CachedDataModule(tmp_path / "x.safetensors", batch_size=90, validation_fraction=0.1)
    batch = next(iter(data.train_dataloader()))
    assert batch.dtype == torch.float32
    assert batch.sort(0).values.equal(x[:90].float().sort(0).values)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (torch.zeros(10, 4, dtype=torch.int64), "floating-point numbers but .*int64"),
        (np.zeros((10, 4), dtype=np.int32), "floating-point numbers but .*int32"),
        (torch.zeros(10), r"of shape \[rows, d\] but"),
        (torch.zeros(0, 4), r"of shape \[rows, d\] but"),
        ({"a": torch.zeros(9, 4), "b": torch.zeros(8, 4)}, "as many rows at each hook"),
        ("nowhere.npy", "there is none at nowhere.npy"),
        ("x.txt", "name .npy, .safetensors files but got x.txt"),
        ("short.npy", "short.npy: it is not a complete array"),
        ("short.safetensors", "short.safetensors: it is not a complete safetensors file"),
        ("folder", "there is none at folder"),
        (["x.npy", "y.npy"], "files of one kind but y.npy holds"),
        ([torch.zeros(40, 8)] * 2, "a list, to name files but it holds a Tensor"),
        (np.zeros((40, 8), dtype=">f4"), "byte order but the tensor is >f4"),
        (np.zeros((40, 8), dtype=np.longdouble), "but the tensor is float128"),
        (torch.zeros(40, 8, device="meta"), "the tensor is on the device meta"),
        (torch.zeros(40, 8).to_sparse(), "the tensor is not dense"),
        (torch.zeros(40, 8).to(torch.float8_e4m3fn), "but the tensor is torch.float8_e4m3fn"),
        ({}, "to hold a tensor but the dictionary has none"),
        (7, "a cache, a tensor, an array, or files"),
    ],
)
def test_what_is_no_matrix_of_activations_is_named(made: Any, said: str, unchecked: None) -> None:
    Path("x.txt").write_text("words")
    Path("folder").mkdir()
    for name, width in (("x", 4), ("y", 5)):
        np.save(f"{name}.npy", np.zeros((10, width), dtype=np.float32))
        save_file({name: torch.zeros(10, width)}, f"{name}.safetensors")
    for suffix in ("npy", "safetensors"):
        Path(f"short.{suffix}").write_bytes(Path(f"x.{suffix}").read_bytes()[:-8])
    with pytest.raises(ValueError, match=said):
        CachedDataModule(made, batch_size=4)


# The command line.


def test_the_command_line_trains_and_tests_on_a_cache_and_on_a_file(
    cache: Path, theirs: Any, tmp_path: Path
) -> None:
    for name, given in (("cache", [str(cache), "--data.hook_name", HOOKS[0]]),
                        ("file", [str(theirs["npy"])])):  # fmt: skip
        root = tmp_path / name
        common = ["--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"]
        model = ["--model", "TopKSAE", "--model.d_sae", "64", "--model.k", "4"]
        data = ["--data", "CachedDataModule", "--data.batch_size", "32", "--data.activations"]
        length = ["--trainer.max_steps", "5", "--trainer.limit_val_batches", "0"]
        lightning_sae(["fit", *model, *data, *given, *common, *length])
        config, last = str(root / "config.yaml"), str(root / "checkpoints" / "last.ckpt")
        lightning_sae(
            ["test", "--config", config, "--ckpt_path", last, "--evaluation.n_tokens", "64"]
        )
        results = json.loads((root / "results.json").read_text())
        assert ("ce_spliced" in results) == (name == "cache")
        assert load(root / "sae").d_in == (16 if name == "cache" else 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", 3),
        ("source", {}),
        ("source", {"hook_name": HOOKS[0]}),
        ("complete", "yes"),
        ("dtype", 1),
        ("shards", {}),
        ("widths", []),
    ],
)
def test_a_manifest_of_other_types_is_refused(
    name: str, value: Any, cache: Path, tmp_path: Path
) -> None:
    content = json.loads((cache / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(ValueError, match=r"manifest\.json: it is damaged"):
        open_cache(tmp_path)


def test_a_manifest_that_is_not_what_was_written_is_refused(cache: Path, own: Path) -> None:
    path = own / "manifest.json"
    written = json.loads(path.read_text())
    altered = {**written, "statistics": {name: {"scale": 1.0} for name in HOOKS}}
    path.write_text(json.dumps(altered))
    with pytest.raises(ValueError, match=r"manifest\.json: it is not what was written"):
        open_cache(own)
    written.pop("checksum")  # as of an earlier version
    path.write_text(json.dumps(written))
    assert open_cache(own).source == open_cache(cache).source
