import copy
import json
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sae import ActivationDataModule, ReLUSAE
from lightning_sae.data import encoding, long_text
from lightning_sae.data.documents import held_out, named
from lightning_sae.data.tokens import TokenBlocks

HOOK = "blocks.1.hook_resid_post"


class Recorder(LightningModule):
    """Keeps the batches it is given; its one weight learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches: list[Tensor] = []
        self.held_out: list[Tensor] = []
        self.statistics: dict[str, float] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch.clone())
        self.statistics = self.trainer.datamodule.statistics()  # type: ignore[attr-defined]
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.held_out.append(batch.clone())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.fixture
def make_data(text_file: Path, models: dict[str, Path]) -> Any:
    """A data module on the tiny Llama: buffer 128, batches of 16, passes of 4 x 16 tokens."""

    def make(**arguments: Any) -> ActivationDataModule:
        settings = {
            "model": models["llama"],
            "text": text_file,
            "validation_fraction": 0.2,
            "context_length": 16,
            "blocks_per_pass": 4,
            "batch_size": 16,
            "buffer_size": 128,
            "n_validation": 128,
            "n_test": 256,
            **arguments,
        }
        return ActivationDataModule(settings.pop("hook_name", HOOK), **settings)

    return make


def trainer(max_steps: int = 10, *callbacks: Callback, **arguments: Any) -> Trainer:
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    settings = {
        **dict.fromkeys(silent, False),
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "accelerator": "cpu",
        "max_steps": max_steps,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        **arguments,
    }
    return Trainer(callbacks=list(callbacks), **settings)


def batches_of_a_fit(
    data: ActivationDataModule, max_steps: int, ckpt_path: Path | None = None, **arguments: Any
) -> Tensor:
    recorder = Recorder()
    trainer(max_steps, **arguments).fit(recorder, data, ckpt_path=ckpt_path)
    return torch.stack(recorder.batches)


@pytest.mark.parametrize(
    ("hook_name", "width"),
    [(HOOK, 16), ("blocks.0.mlp.hook_post", 24), ("blocks.0.ln1.hook_normalized", 16)],
)
def test_the_width_is_the_models_at_the_hook(make_data: Any, hook_name: str, width: int) -> None:
    data = make_data(hook_name=hook_name)
    assert data.d_in == width
    assert batches_of_a_fit(data, 3).shape == (3, 16, width)


def test_training_and_held_out_documents_are_disjoint_and_together_all(
    make_data: Any, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    encode, encode_together = long_text.encode, encoding.encode_together

    def noted(tokenizer: Any, text: str) -> list[int]:
        read.add(text)
        return encode(tokenizer, text)

    def all_noted(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        read.update(texts)
        return encode_together(tokenizer, texts)

    monkeypatch.setattr(long_text, "encode", noted)
    monkeypatch.setattr(encoding, "encode_together", all_noted)
    data, recorder = make_data(n_test=3000), Recorder()
    trainer(400).fit(recorder, data)
    assert recorder.statistics["text_epoch"] > 1
    trained = set(read)
    read.clear()
    trainer().test(recorder, data, verbose=False)
    assert read == {text for text in documents if held_out(named(text).name, 0.2)}
    assert 3 < len(read) < 25
    assert trained == set(documents) - read


def test_with_a_separate_validation_text_all_of_the_text_is_trained_on(
    make_data: Any, documents: list[str], tmp_path: Path
) -> None:
    own = tmp_path / "validation.txt"
    own.write_text("the big house and the small tree then run over to a red dog")
    data = make_data(validation_text=own)
    recorder = Recorder()
    trainer(2, limit_val_batches=1.0, val_check_interval=1).fit(recorder, data)
    assert data.validation_fraction == 0.0
    assert {d.text for d in data.held_out_corpus.epoch(0)} == {own.read_text()}
    assert {d.text for d in data.corpus.epoch(0)} == set(documents)
    alone = make_data(text=own, validation_fraction=1.0)
    expected = torch.cat(held_out_batches(alone))
    torch.testing.assert_close(torch.cat(recorder.held_out)[: len(expected)], expected)


def held_out_batches(data: ActivationDataModule) -> list[Tensor]:
    recorder = Recorder()
    trainer(limit_val_batches=1.0).validate(recorder, data, verbose=False)
    return recorder.held_out


def test_held_out_batches_are_the_activations_of_the_held_out_tokens_in_order(
    make_data: Any,
) -> None:
    data = make_data(batch_size=24)
    batches = held_out_batches(data)
    blocks = torch.cat(list(data.held_out_tokens(128)))
    expected = data.language_model.activations(blocks)[blocks != 0]
    torch.testing.assert_close(torch.cat(batches), expected, atol=1e-5, rtol=0)
    assert all(0 < len(batch) <= 24 for batch in batches)
    assert len(held_out_batches(data)) == len(batches)


@pytest.mark.parametrize("positions", [None, (3, 16), (12, 14)])
@pytest.mark.parametrize("batch_size", [16, 48, 100])
def test_the_number_of_held_out_batches_does_not_depend_on_what_is_left_out(
    make_data: Any, positions: tuple[int, int] | None, batch_size: int
) -> None:
    data = make_data(positions=positions, batch_size=batch_size)
    assert len(held_out_batches(data)) == 2 * -(-64 // batch_size)


def test_validation_does_not_advance_the_training_stream(make_data: Any) -> None:
    alone = batches_of_a_fit(make_data(), 20)
    validated = batches_of_a_fit(
        make_data(), 20, limit_val_batches=1.0, val_check_interval=3, num_sanity_val_steps=2
    )
    assert torch.equal(validated, alone)


def test_reading_ahead_and_the_global_seed_change_no_batch(make_data: Any) -> None:
    torch.manual_seed(1)
    ahead = batches_of_a_fit(make_data(), 20)
    torch.manual_seed(2)
    assert torch.equal(batches_of_a_fit(make_data(prefetch=False), 20), ahead)
    assert not torch.equal(batches_of_a_fit(make_data(seed=1), 20), ahead)


def test_training_rows_are_the_models_activations_each_once(make_data: Any) -> None:
    data = make_data()
    rows = batches_of_a_fit(data, 12).flatten(0, 1)
    blocks = data.training_blocks().read(30)
    activations = data.language_model.activations(blocks)[blocks != 0]
    # Blocks that begin alike have rows alike: each comes no more often than the text gives it.
    times_served = (distances(rows, rows) < 1e-4).sum(1)
    times_in_text = (distances(rows, activations) < 1e-4).sum(1)
    assert (times_served > 0).all()
    assert (times_served <= times_in_text).all()


@pytest.mark.parametrize("dropped", [True, False])
def test_special_tokens_are_trained_on_only_if_asked_for(make_data: Any, dropped: bool) -> None:
    data = make_data(drop_special_tokens=dropped)
    rows = batches_of_a_fit(data, 12).flatten(0, 1)
    blocks = data.training_blocks().read(30)
    at_bos = data.language_model.activations(blocks)[blocks == 0]
    assert (distances(rows, at_bos).min() > 1e-2) == dropped


def test_what_is_left_out_is_counted_while_training(make_data: Any) -> None:
    data, recorder = make_data(positions=(4, 16), max_norm_multiple=1.2, prefetch=False), Recorder()
    assert data.statistics() == {}
    trainer(2).fit(recorder, data)
    assert recorder.statistics["seen"] % 64 == 0
    assert recorder.statistics["dropped_position"] == 0.25
    assert 0 < recorder.statistics["dropped_special_token"] < 0.2
    assert recorder.statistics["dropped_norm"] > 0


class FirstBuffer(Callback):
    """What an SAE sees of the buffer after the first step."""

    seen: Tensor

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.seen = pl_module.scaled(trainer.datamodule.buffer.rows)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_centring_and_scaling_are_what_the_sae_sees(
    make_data: Any, center: bool, scale: bool
) -> None:
    data, first = make_data(center=center, scale=scale), FirstBuffer()
    assert data.scaling() is None
    sae = ReLUSAE(16, 32, decoder_norm="free")
    trainer(2, first).fit(sae, data)
    assert first.seen.shape == (128, 16)
    norm, mean = first.seen.norm(dim=-1).mean(), first.seen.mean(0).norm()
    assert (abs(norm - 4.0) < 1e-4) == scale
    assert (mean < 1e-4) == center
    assert (data.scaling() is None) == (not center and not scale)


def test_scaling_may_be_asked_for_before_the_first_batch(make_data: Any) -> None:
    data = make_data(center=False, prefetch=False)
    loader = data.train_dataloader()
    asked = data.scaling()
    next(iter(loader))
    assert torch.equal(
        torch.tensor(16.0).sqrt() / data.buffer.rows.norm(dim=-1).mean(), asked.scale
    )


@pytest.mark.parametrize("n_before", [1, 5, 8, 13])
def test_a_resumed_run_gets_the_batches_of_one_that_was_not_stopped(
    make_data: Any, n_before: int, tmp_path: Path
) -> None:
    whole = batches_of_a_fit(make_data(), 24)
    path = tmp_path / "run.ckpt"
    run = trainer(n_before)
    run.fit(Recorder(), make_data())
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["ActivationDataModule"]
    assert state["rows"].shape == (128, 16)
    rest = batches_of_a_fit(make_data(), 24, ckpt_path=path)
    assert torch.equal(rest, whole[n_before:])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_checkpoint_of_the_middle_of_a_run_gives_the_rest_of_it(
    make_data: Any, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    recorder = Recorder()
    trainer(20, saving).fit(recorder, make_data())
    for step in (7, 14):
        path = tmp_path / f"step={step}.ckpt"
        rest = batches_of_a_fit(make_data(prefetch=False), 20, ckpt_path=path)
        assert torch.equal(rest, torch.stack(recorder.batches[step:]))


def test_a_large_mean_costs_no_digits_of_a_short_dtype_and_a_resume_is_exact(
    make_data: Any, tmp_path: Path
) -> None:
    def make(dtype: str) -> ActivationDataModule:
        data = make_data(dtype=dtype, center=True)
        model, large = data.language_model, torch.zeros(16).index_fill(0, torch.tensor(3), 1e5)
        plain = model.activations
        model.activations = lambda tokens: plain(tokens) + large
        return data

    full, short = (batches_of_a_fit(make(dtype), 20) for dtype in ("float32", "bfloat16"))
    spread = (full - full.mean((0, 1))).abs().amax()
    assert (short - full).abs().max() < 0.01 * spread  # in bfloat16, 1e5 is exact to 256
    run = trainer(7)
    run.fit(Recorder(), make("bfloat16"))
    run.save_checkpoint(tmp_path / "run.ckpt")
    rest = batches_of_a_fit(make("bfloat16"), 20, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(rest, short[7:])


class Asks(Callback):
    """Asks for unseen activations at the end, and notes what a checkpoint would hold then."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        before = copy.deepcopy(data.state_dict())
        self.rows = data.unseen(90)
        for state in (before, after := data.state_dict()):
            del state["hook_names"]  # text cannot be compared so
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_unseen_activations_are_of_text_that_follows_and_change_nothing(
    make_data: Any, tmp_path: Path
) -> None:
    recorder, asks = Recorder(), Asks()
    run = trainer(9, asks)
    run.fit(recorder, make_data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert asks.rows.shape == (90, 16)
    nearest = distances(asks.rows, torch.cat(recorder.batches)).amin(1)
    assert (nearest > 1e-4).float().mean() > 0.8
    later = Asks()  # of a run that stopped there and had nothing left to train but one step
    trainer(10, later).fit(Recorder(), make_data(prefetch=False), ckpt_path=tmp_path / "run.ckpt")
    whole = Asks()
    trainer(10, whole).fit(Recorder(), make_data())
    assert torch.equal(later.rows, whole.rows)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": "bfloat16"}, r"`data.dtype` to be torch.float32 but got torch.bfloat16"),
        ({"buffer_size": 160}, r"`data.buffer_size` to be 128 but got 160"),
        ({"refill_fraction": 0.25}, r"`data.refill_fraction` to be 0.5 but got 0.25"),
        ({"document_start": "none"}, r"`data.document_start` to be auto but got none"),
    ],
)
def test_what_makes_another_buffer_may_not_change(
    changed: dict[str, Any], words: str, make_data: Any, tmp_path: Path
) -> None:
    run, path = trainer(2), tmp_path / "run.ckpt"
    run.fit(ReLUSAE(16, 8), make_data())
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match=words):
        trainer(4).fit(ReLUSAE(16, 8), make_data(**changed), ckpt_path=path)


def test_a_second_run_with_the_same_data_starts_at_the_beginning(
    make_data: Any, tmp_path: Path
) -> None:
    data, run = make_data(), trainer(12)
    run.fit(Recorder(), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    first = batches_of_a_fit(data, 12)
    assert torch.equal(batches_of_a_fit(data, 12), first)
    batches_of_a_fit(data, 15, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(batches_of_a_fit(data, 12), first)


def test_a_buffer_too_large_to_save_is_refilled_with_a_warning(
    make_data: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    run, recorder = trainer(9), Recorder()
    run.fit(recorder, make_data(largest_saved_buffer=100))
    run.save_checkpoint(path)
    assert path.stat().st_size < 20_000
    data = make_data(largest_saved_buffer=100)
    with pytest.warns(UserWarning, match="larger than `largest_saved_buffer`.*refilled"):
        rest = batches_of_a_fit(data, 40, ckpt_path=path)
    assert rest.shape == (31, 16, 16)
    nearest = distances(torch.cat([*rest[:8]]), torch.cat(recorder.batches)).amin(1)
    assert (nearest < 1e-4).float().mean() < 0.2, "text that was trained on comes again"
    trainer().test(Recorder(), make_data(), ckpt_path=path, verbose=False)  # no warning


def test_threads_end_with_the_run(make_data: Any) -> None:
    data = make_data()
    batches_of_a_fit(data, 3)
    assert not [t for t in threading.enumerate() if t.name.startswith("activations")]
    assert data.buffer is None


def test_the_source_is_plain_and_complete(make_data: Any, models: dict[str, Path]) -> None:
    source = make_data(positions=(1, 9), text=["a.txt", Path("b.txt")]).source
    assert json.loads(json.dumps(source)) == source
    assert source == {
        "model": str(models["llama"]),
        "model_revision": None,
        "model_dtype": "float32",
        "quantization": None,
        "hook_name": HOOK,
        "head": None,
        "context_length": 16,
        "drop_special_tokens": True,
        "positions": [1, 9],
        "max_norm_multiple": None,
        "text": ["a.txt", "b.txt"],
        "text_column": "text",
        "document_start": "auto (bos before texts)",
        "separator": "auto (none between texts)",
        "pack": True,
        "keep_rest": True,
        "chat_roles": None,
    }
    assert ActivationDataModule(HOOK).source["model"] == "embedded"


def test_a_context_longer_than_the_models_is_refused(make_data: Any) -> None:
    assert make_data(context_length=64).d_in == 16
    with pytest.raises(ValueError, match="`context_length` to be at most 64.* got 65: make it"):
        _ = make_data(context_length=65).d_in


@pytest.mark.parametrize("value", [1, 0, -1])
def test_a_context_without_a_next_token_is_refused(make_data: Any, value: int) -> None:
    with pytest.raises(ValueError, match=f"`context_length` to be at least 2.* got {value}"):
        make_data(context_length=value)


@pytest.mark.parametrize("positions", [(16, 20), (5, 5), (-1, 3)])
def test_positions_that_keep_nothing_are_refused(
    make_data: Any, positions: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="`positions` .* within `context_length`=16, but got"):
        make_data(positions=positions)


def test_a_batch_larger_than_the_buffer_is_refused(make_data: Any) -> None:
    with pytest.raises(ValueError, match="between 1 and `buffer_size`=128 but got 129: make the"):
        make_data(batch_size=129)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "little.txt has none: give more text"),
        ("<|endoftext|>".join("ab"), "at least 16 training tokens .*give more text"),
        ("the cat sees the dog and runs. " * 5, "held-out documents .*or set `validation_text`"),
    ],
)
def test_too_little_text_is_refused_before_any_work(
    make_data: Any, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "little.txt").write_text(content)
    data, recorder = make_data(text=tmp_path / "little.txt"), Recorder()
    with pytest.raises(ValueError, match=message):
        trainer(limit_val_batches=1.0, val_check_interval=5).fit(recorder, data)
    assert not recorder.batches


def test_without_validation_no_document_need_be_held_out(make_data: Any, tmp_path: Path) -> None:
    data = make_data(validation_fraction=0.0)
    assert len(batches_of_a_fit(data, 2)) == 2
    with pytest.raises(ValueError, match="held-out documents .*is 0.0.*set `validation_text`"):
        trainer().test(Recorder(), data)


def test_a_run_without_an_end_is_refused(make_data: Any) -> None:
    with pytest.raises(ValueError, match="no end: set `trainer.max_steps` .* 16 activations"):
        trainer(-1, max_epochs=3).fit(Recorder(), make_data())


def test_a_run_may_end_by_the_length_of_its_epochs(make_data: Any) -> None:
    limited = trainer(-1, max_epochs=2, limit_train_batches=3)
    limited.fit(Recorder(), make_data())
    assert limited.global_step == 6


def test_held_out_text_is_read_once_and_no_more(make_data: Any) -> None:
    data = make_data(n_test=10**6)
    tokens = torch.cat(list(data.held_out_tokens(10**6)))
    blocks = data.held_out_blocks()
    assert torch.equal(tokens, blocks.read(len(tokens)))
    assert blocks.epoch == 0
    blocks.read(1)
    assert blocks.epoch == 1
    assert sum(map(len, data.test_dataloader())) <= tokens.numel()


def test_too_few_held_out_tokens_warn_once_with_both_numbers(
    make_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(n_test=10**6)
    list(data.held_out_tokens(128))  # there are as many
    assert not caplog.messages
    n = sum(tokens.numel() for tokens in data.held_out_tokens(10**6))
    list(data.test_dataloader())
    list(data.held_out_tokens(2 * 10**6))  # others, such as callbacks, ask for other numbers
    (message,) = caplog.messages
    assert f"has {n:,} tokens, fewer than the 1,000,000 asked for" in message


def test_a_run_says_how_often_it_reads_its_text(
    make_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches_of_a_fit(make_data(drop_special_tokens=False), 400)
    (message,) = [message for message in caplog.messages if "a pass over it" in message]
    blocks, n = make_data().training_blocks(), 0
    while len(found := blocks.read_first_epoch(1)):
        n += found.numel()
    told = int(message.split("gives about ")[1].split(" ")[0].replace(",", ""))
    assert n <= told < n + 16  # the last block also holds the beginning of the next pass
    assert f"`max_steps` asks for {400 * 16:,}" in message
    assert f"about {6400 / told:.3g} times" in message


def test_unknown_characters_warn_with_their_share(
    make_data: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.unk_token = strict.tokenize(" the")[0]  # as if that were not in the vocabulary
    data = make_data(tokenizer=strict)
    batches_of_a_fit(data, 2)
    held_out_batches(data)
    said = [message for message in caplog.messages if "does not know" in message]
    assert [part in message for part, message in zip(("training", "held-out"), said, strict=True)]


def test_held_out_text_is_tokenised_once_for_all_validations(
    make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data()
    first = held_out_batches(data)
    monkeypatch.setattr(TokenBlocks, "read", None)
    data._require_text = lambda blocks: None
    again = held_out_batches(data)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    monkeypatch.undo()
    # A longer look goes on where the shorter one ended.
    assert torch.equal(
        torch.cat(list(data.held_out_tokens(10**6))),
        torch.cat(list(make_data().held_out_tokens(10**6))),
    )


def test_padding_is_read_by_the_model_and_not_trained_on(make_data: Any) -> None:
    short = [{"text": f"the cat {i}"} for i in range(60)]
    data = make_data(text=short, pack=False, validation_fraction=0.0, prefetch=False)
    recorder = Recorder()
    trainer(3).fit(recorder, data)
    blocks = data.training_blocks().read(40)
    lengths = (blocks >= 0).sum(1)
    assert (lengths < 16).all()
    alone = [  # each document by itself, without its BOS
        data.language_model.activations(block[:n].unsqueeze(0))[0, 1:]
        for block, n in zip(blocks, lengths.tolist(), strict=True)
    ]
    rows = torch.stack(recorder.batches).flatten(0, 1)
    assert (distances(rows, torch.cat(alone)).amin(1) < 1e-4).all()
    assert recorder.statistics["dropped_context_only"] > 0.3


def test_token_ids_are_trained_on_without_a_tokenizer(make_data: Any) -> None:
    ids = torch.randint(1, 300, (40, 16), generator=torch.Generator().manual_seed(0))
    data = make_data(text=ids, validation_fraction=0.0, prefetch=False)
    data.language_model.tokenizer = None
    rows = batches_of_a_fit(data, 8).flatten(0, 1)
    expected = data.language_model.activations(ids).flatten(0, 1)
    assert (distances(rows, expected).amin(1) < 1e-4).all()
    assert data.special_tokens == []


def test_a_resumed_run_goes_on_within_a_long_document(
    make_data: Any, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "WINDOW", 400)
    monkeypatch.setattr(long_text, "OVERLAP", 200)
    settings = {"text": [{"text": " ".join(documents)}], "validation_fraction": 0.0}
    whole = batches_of_a_fit(make_data(**settings), 24)
    run = trainer(13)
    run.fit(Recorder(), make_data(**settings))
    run.save_checkpoint(tmp_path / "run.ckpt")
    rest = batches_of_a_fit(make_data(**settings), 24, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(rest, whole[13:])


def test_a_checkpoint_used_with_another_rule_of_documents_says_so(
    make_data: Any, tmp_path: Path
) -> None:
    run = trainer(2)
    run.fit(ReLUSAE(16, 32), make_data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.warns(
        UserWarning, match=r"document_start auto \(bos before texts\) to none; pack True to False"
    ):
        trainer().test(
            ReLUSAE(16, 32),
            make_data(document_start="none", pack=False),
            ckpt_path=tmp_path / "run.ckpt",
            verbose=False,
        )


def test_validation_that_would_never_come_is_warned_of(make_data: Any) -> None:
    with pytest.warns(UserWarning, match="set `trainer.val_check_interval` to a number of batches"):
        trainer(2, limit_val_batches=1.0).fit(Recorder(), make_data())


def test_reading_ahead_stops_when_the_run_fails(make_data: Any) -> None:
    class Fails(Recorder):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("broken")

    data = make_data()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(3).fit(Fails(), data)
    assert not [t for t in threading.enumerate() if t.name.startswith("activations")]


def test_a_loop_without_a_trainer_gets_the_same_batches(make_data: Any) -> None:
    recorder = Recorder()
    trainer(4).fit(recorder, datamodule=make_data())
    data = make_data()
    data.setup("fit")
    own = list(islice(data.train_dataloader(), 4))
    held_out = list(data.val_dataloader())
    data.teardown("fit")
    assert all(map(torch.equal, own, recorder.batches))
    assert all(map(torch.equal, held_out, recorder.held_out))


def test_one_head_of_several_hooks(make_data: Any) -> None:
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    every, one = make_data(hook_name=names), make_data(hook_name=names, head=1)
    for data in (every, one):
        data.setup("fit")
    whole, part = (next(iter(data.train_dataloader())) for data in (every, one))
    for data in (every, one):
        data.teardown("fit")
    for name in names:
        width = part[name].shape[1]
        assert one.d_in[name] == width
        assert torch.equal(part[name], whole[name][:, width : 2 * width])
    with pytest.raises(ValueError, match="`head`"):
        make_data(hook_name=["blocks.0.attn.hook_z", HOOK], head=1).setup("fit")
