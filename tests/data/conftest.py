"""Tiny language models of three families, with a tokenizer and text to go with them."""

import random
from pathlib import Path
from typing import Any

import pytest

MARK = "<|endoftext|>"
CONTEXT = 64


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sixty short texts, each with a number of its own."""
    words = ["the", "cat", "dog", "sees", "runs", "a", "big", "small", "red", "and", "then", "over"]
    rng = random.Random(0)
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(15, 40))) for i in range(60)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """The documents in one file."""
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text(MARK.join(documents))
    return path


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE whose BOS and EOS are the mark between documents, token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=MARK, eos_token=MARK)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Folders of random models: `neox` (parallel blocks), `gpt2`, `llama` (grouped queries)."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    width = {"hidden_size": 16, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT}
    configs = {
        "neox": GPTNeoXConfig(num_attention_heads=2, intermediate_size=32, **width, **common),
        "gpt2": GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=CONTEXT, **common),
        "llama": LlamaConfig(
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, **width, **common
        ),
    }
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        config.initializer_range = 0.2  # large enough for every part to matter
        folders[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
