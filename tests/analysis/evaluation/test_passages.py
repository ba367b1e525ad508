"""Held-out documents as passages and blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import ActivationDataModule
from lightning_sae.analysis.evaluation.passages import blocks_of, halves, read_passages
from lightning_sae.analysis.evaluation.sample import read_sample
from lightning_sae.data.documents import held_out

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def data() -> ActivationDataModule:
    return ActivationDataModule(HOOK, context_length=32)


@pytest.fixture(scope="module")
def passages(data: ActivationDataModule) -> list:
    return read_passages(data, 4000, 200)


def test_passages_are_the_beginnings_of_held_out_documents(
    data: ActivationDataModule, passages: list
) -> None:
    tokenizer = data.language_model.tokenizer
    assert 4000 <= sum(len(p.tokens) for p in passages) < 4300
    for passage in passages:
        assert held_out(passage.name, 0.1)
        assert passage.tokens[0] == tokenizer.bos_token_id
        assert passage.pieces[0] == ""
        whole = [*tokenizer(passage.text)["input_ids"]]
        assert passage.tokens[1:] == whole[:200]
        assert passage.text.startswith("".join(passage.pieces))
        assert "".join(passage.pieces) == tokenizer.decode(passage.tokens[1:])


def test_a_block_holds_one_passage_and_ends_padded(passages: list) -> None:
    blocks = blocks_of(passages, 32)
    for number, passage in enumerate(passages):
        own = blocks.tokens[blocks.passage == number].flatten()
        assert own[: len(passage.tokens)].tolist() == passage.tokens
        assert (own[len(passage.tokens) :] < 0).all()
        assert len(own) - len(passage.tokens) < 32


def test_halves_share_every_kind(passages: list) -> None:
    tested = halves(passages)
    for kind in {p.kind for p in passages}:
        own = tested[torch.tensor([p.kind == kind for p in passages])]
        assert abs(2 * int(own.sum()) - len(own)) <= 1


def test_token_ids_and_a_column_of_labels_are_read_together(tmp_path: Path) -> None:
    rows = [{"text": f"word {i} here", "topic": "odd" if i % 2 else "even"} for i in range(200)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = ActivationDataModule(HOOK, text=str(path), validation_fraction=0.5, context_length=8)
    found = read_passages(data, 300, 100, "topic")
    assert {p.kind for p in found} == {"rows.jsonl"}
    for passage in found:
        odd = int(passage.text.split()[1]) % 2
        assert passage.label == ("odd" if odd else "even")
    ids = ActivationDataModule(
        HOOK,
        text=[[5, 6, 7, i % 50] for i in range(200)],
        validation_fraction=0.9,
        context_length=8,
    )
    for passage in read_passages(ids, 100, 100):
        assert passage.text == ids.language_model.tokenizer.decode(passage.tokens)
    with pytest.raises(ValueError, match="`label_column` to name a column"):
        read_passages(data, 300, 100, "subject")


def rows_data(rows: list, **settings: Any) -> ActivationDataModule:
    """Rows of which all are held out."""
    return ActivationDataModule(
        HOOK, text=rows, validation_fraction=1.0, context_length=8, **settings
    )


def test_what_training_skips_is_no_passage() -> None:
    rows: list = [{"text": f"word {i} is here"} for i in range(9)]
    rows += [{"text": text} for text in ("", "  \n\t ", "half \ud800 of a character", None, 7)]
    rows.append({"text": ActivationDataModule(HOOK).language_model.tokenizer.bos_token})
    assert len(read_passages(rows_data(rows), 1000, 100)) == 9


def test_the_mark_that_begins_a_document_is_not_repeated() -> None:
    bos = ActivationDataModule(HOOK).language_model.tokenizer.bos_token
    data = rows_data([{"text": f"{bos}word {i} is here"} for i in range(9)])
    for passage in read_passages(data, 1000, 100):
        assert passage.tokens.count(data.language_model.tokenizer.bos_token_id) == 1
        assert len(passage.tokens) == len(passage.pieces)
        assert passage.text.startswith("".join(passage.pieces))


def test_tokens_that_are_only_context_shift_no_label() -> None:
    data = rows_data([[5, 6, 7, 8, 9, 10, 11, i] for i in range(9)])
    # Tokens of another role, in a chat, are stored as ~id; the padding at the end as ~0.
    passages = [p._replace(tokens=[~5, ~6, *p.tokens[2:6]]) for p in read_passages(data, 1000, 100)]
    sample = read_sample(data, blocks_of(passages, 8))
    everything = torch.tensor([token for p in passages for token in p.tokens])
    assert len(sample.ids) == 9 * 4
    assert torch.equal(everything[sample.token], sample.ids)


def test_a_text_without_columns_has_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("<|endoftext|>".join(f"word {i} is here" for i in range(20)))
    data = ActivationDataModule(HOOK, text=str(path), validation_fraction=1.0, context_length=8)
    with pytest.raises(ValueError, match=r"`label_column` .* got topic, and .*plain.txt has no"):
        read_passages(data, 1000, 100, "topic")


def test_too_few_tokens_asked_for_are_not_blamed_on_the_text() -> None:
    data = rows_data([{"text": f"word {i} is here"} for i in range(99)])
    with pytest.raises(ValueError, match=r"read more than 10 tokens \(`probe_tokens`\)"):
        read_passages(data, 10, 100)


def test_a_text_too_short_is_refused() -> None:
    data = ActivationDataModule(
        HOOK, text=[{"text": "some words"}] * 3, validation_fraction=1.0, context_length=8
    )
    with pytest.raises(ValueError, match="at least 4 held-out documents and 32 tokens"):
        read_passages(data, 100, 100)
