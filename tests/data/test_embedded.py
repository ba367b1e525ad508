"""The embedded model: its corpus, its split, its recipe, its folder."""

from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lightning_sae.data.documents import Document, held_out
from lightning_sae.data.embedded import (
    EMBEDDED_MODEL,
    HELD_OUT_FRACTION,
    standard_library_documents,
    stdlib,
)
from lightning_sae.data.embedded.recipe import (
    Settings,
    entropy,
    evaluate,
    main,
    pack,
    split,
    train_embedded_model,
    train_tokenizer,
)
from lightning_sae.data.embedded.training import ShuffledWindows, next_token_losses


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return standard_library_documents()


@pytest.fixture
def tiny() -> tuple[list[Document], Settings]:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" * 20 for i in range(40)]
    corpus = [Document(f"file_{i}.py", text) for i, text in enumerate(texts)]
    settings = Settings(
        steps=5, batch_size=2, context=16, vocabulary=280, width=16, layers=1, heads=2
    )
    return corpus, settings


def test_the_model_beats_the_unigram_entropy_of_the_same_held_out_tokens_by_2_8_nats(
    documents: list[Document],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED_MODEL)
    texts = [d.text for d in documents if held_out(d.name, HELD_OUT_FRACTION)]
    # Windows from all files: some files are much easier than others.
    windows = pack(tokenizer, texts).unfold(0, 257, 256)[::6]
    with torch.no_grad():
        losses = torch.cat([next_token_losses(model, rows) for rows in windows.split(16)])
    assert len(losses) > 20_000
    assert losses.mean() < entropy(windows[:, 1:].flatten()) - 2.8


def test_evaluate_agrees_with_a_naive_loop(documents: list[Document]) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED_MODEL)
    text = documents[0].text[:600]
    figures = evaluate(model, tokenizer, [text], 32)
    tokens = [0, *tokenizer(text).input_ids]
    losses = []
    for first in range(0, len(tokens) - 32, 32):
        row = torch.tensor([tokens[first : first + 33]])
        with torch.no_grad():
            losses.append(model(input_ids=row, labels=row).loss.item())
    assert figures.n_tokens == 32 * len(losses)
    assert figures.cross_entropy == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_entropy_of_a_uniform_and_of_a_constant_row() -> None:
    assert entropy(torch.tensor([3, 5, 7, 9])) == pytest.approx(1.3862943611)
    assert entropy(torch.tensor([2, 2, 2])) == 0.0


@pytest.mark.parametrize(
    ("hook", "width"),
    [
        ("blocks.1.hook_resid_post", 128),
        ("blocks.0.mlp.hook_post", 512),
        ("blocks.0.hook_mlp_out", 128),
    ],
)
def test_residual_and_mlp_hooks_fire_and_steer_by_transformer_lens_name(
    hook: str, width: int
) -> None:
    bridge = TransformerBridge.boot_transformers(str(EMBEDDED_MODEL), device="cpu")
    tokens = torch.arange(12)[None]
    shapes = []

    def zero(activation: torch.Tensor, **_: object) -> torch.Tensor:
        shapes.append(tuple(activation.shape))
        return torch.zeros_like(activation)

    with torch.no_grad():
        clean = bridge(tokens)
        ablated = bridge.run_with_hooks(tokens, fwd_hooks=[(hook, zero)])
    assert shapes == [(1, 12, width)]
    assert not torch.allclose(clean, ablated, atol=0.1)


def test_the_bridge_and_transformers_give_the_same_logits() -> None:
    bridge = TransformerBridge.boot_transformers(str(EMBEDDED_MODEL), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_is_lossless_and_its_only_special_token_is_bos_and_eos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = "def naïve(x):\n\treturn  x  # 日本 \r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]


def test_the_folder_holds_at_most_8_megabytes_and_a_card_with_the_command() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.iterdir()) <= 8_000_000
    card = (EMBEDDED_MODEL / "README.md").read_text(encoding="utf-8")
    assert "Held-out cross-entropy" in card
    assert "python -m lightning_sae.data.embedded.recipe --output" in card


def test_the_split_is_disjoint_complete_and_independent_of_order(
    documents: list[Document],
) -> None:
    train, rest = split(documents)
    assert sorted([*train, *rest]) == sorted(d.text for d in documents)
    assert 0.05 < len(rest) / len(documents) < 0.15
    backwards = split(documents[::-1])
    assert (sorted(train), sorted(rest)) == (sorted(backwards[0]), sorted(backwards[1]))


def test_held_out_is_pinned_nested_and_refuses_what_is_no_share() -> None:
    names = [f"{i}.py" for i in range(2000)]
    small, large = ({n for n in names if held_out(n, f)} for f in (0.1, 0.3))
    assert small < large
    assert 150 < len(small) < 250
    assert not any(held_out(n, 0.0) for n in names)
    assert all(held_out(n, 1.0) for n in names)
    assert [n for n in names[:40] if n in small] == ["0.py", "4.py", "11.py", "12.py", "25.py"]
    with pytest.raises(ValueError, match="fraction: expected a share"):
        held_out("a", 10.0)


def test_the_corpus_is_sorted_and_without_tests_and_installed_packages(
    documents: list[Document],
) -> None:
    names = [d.name for d in documents]
    assert names == sorted(set(names))
    assert "json/decoder.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}


def test_undecodable_files_are_left_out_and_too_little_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"# \xff\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("x = 1\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=r"found 30 in 1 files.*use a Python from"):
        standard_library_documents()
    monkeypatch.setattr(stdlib, "_MINIMUM_BYTES", 1)
    expected = [Document("good.py", "# -*- coding: latin-1 -*-\n# é\n", may_be_empty=True)]
    assert standard_library_documents() == expected


def test_windows_cover_consecutive_tokens_and_each_epoch_is_cut_anew() -> None:
    batches = ShuffledWindows(torch.arange(1000), context=8, batch_size=4, seed=0)
    epochs = [torch.cat(list(batches)) for _ in range(2)]
    for windows in epochs:
        assert torch.equal(windows, windows[:, :1] + torch.arange(9))
        assert len(windows[:, 0].unique()) == len(windows)
        assert len(windows) >= 120
    assert not torch.equal(epochs[0], epochs[1])


def test_text_too_short_for_one_batch_is_refused_instead_of_waited_for() -> None:
    enough = torch.arange(8 * (4 + 1))
    assert len(list(ShuffledWindows(enough, context=8, batch_size=4, seed=0))) == 1
    with pytest.raises(ValueError, match="tokens: expected at least 40"):
        ShuffledWindows(enough[1:], context=8, batch_size=4, seed=0)


def test_packing_puts_bos_before_every_document() -> None:
    tokenizer = train_tokenizer(["a = 1\n", "b = 2\n"], 270)
    tokens = pack(tokenizer, ["a = 1\n", "b = 2\n"])
    one, two = (tokenizer(text).input_ids for text in ("a = 1\n", "b = 2\n"))
    assert tokens.tolist() == [0, *one, 0, *two]


def test_the_recipe_leaves_a_folder_that_transformers_loads_and_the_same_seed_repeats_it(
    tmp_path: Path, tiny: tuple[list[Document], Settings]
) -> None:
    figures = [train_embedded_model(tmp_path / name, *tiny) for name in ("first", "second")]
    assert figures[0] == figures[1]
    folder = tmp_path / "first"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert model.dtype == torch.float32
    again = evaluate(model, tokenizer, split(tiny[0])[1], 16)
    assert again.cross_entropy == pytest.approx(figures[0].cross_entropy, rel=1e-5)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{figures[0].cross_entropy:.3f} nats/token" in card
    assert "--steps 5" in card


def test_the_recipe_refuses_a_folder_that_holds_something(
    tmp_path: Path, tiny: tuple[list[Document], Settings]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="output: expected a new or an empty folder"):
        train_embedded_model(folder, *tiny)
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


def test_the_command_line_documents_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert "Optimizer steps" in help_text
    assert "--learning_rate" in help_text
