"""The documents' own settings: small stand-ins answer for the hub, and each trains for a moment."""

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

from lightning_sae.cli import main
from lightning_sae.data.embedded import EMBEDDED_MODEL

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs" / "full").glob("*.yaml"))
SMALLER = {
    "d_sae": 128,
    "batch_size": 64,
    "buffer_size": 1024,
    "blocks_per_pass": 2,
    "context_length": 64,
    "every_n_steps": 400_000,
    "accelerator": "cpu",
    "limit_val_batches": 0,
}
COMMON: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 2048}
NETWORKS = {
    "EleutherAI/pythia-70m": transformers.GPTNeoXConfig(
        num_hidden_layers=6, num_attention_heads=2, **COMMON
    ),
    "EleutherAI/pythia-70m-deduped": transformers.GPTNeoXConfig(
        num_hidden_layers=6, num_attention_heads=2, **COMMON
    ),
    "EleutherAI/pythia-2.8b": transformers.GPTNeoXConfig(
        num_hidden_layers=32, num_attention_heads=2, **COMMON
    ),
    "google/gemma-2-2b": transformers.Gemma2Config(
        num_hidden_layers=26,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        **COMMON,
    ),
}
"""Each as deep as the model whose name it answers to."""


class Hub:
    """Answers to the calls that would go there, and notes them."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.one_layer = folder / "one-layer"
        self.real_config = transformers.AutoConfig.from_pretrained
        self.real_model = transformers.AutoModelForCausalLM.from_pretrained
        self.real_tokenizer = transformers.AutoTokenizer.from_pretrained
        self.real_bridge = TransformerBridge.boot_transformers
        config = transformers.GPTNeoXConfig(num_hidden_layers=1, num_attention_heads=2, **COMMON)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(self.one_layer)
        self.tokenizer("").save_pretrained(self.one_layer)

    def config(self, name: str, **options: Any) -> Any:
        if Path(name).is_dir():
            return self.real_config(name, **options)
        if name not in NETWORKS:
            raise OSError(f"{name} is not a model of transformers")
        return NETWORKS[name]

    def model(self, name: str, **options: Any) -> Any:
        if Path(name).is_dir():
            return self.real_model(name, **options)
        self.asked.append(name)
        dtype = {} if options["dtype"] == "auto" else {"dtype": options["dtype"]}
        network = transformers.AutoModelForCausalLM.from_config(NETWORKS[name], **dtype)
        return network, {"missing_keys": []}

    def tokenizer(self, _name: str, **_options: Any) -> Any:
        return self.real_tokenizer(EMBEDDED_MODEL)

    def bridge(self, name: str, dtype: torch.dtype) -> Any:
        self.asked.append(name)
        return self.real_bridge(str(self.one_layer), dtype=dtype)

    def data_set(self, name: str, split: str, streaming: bool) -> Any:
        assert streaming
        self.asked.append(name)
        texts = [f"document {i}: " + "some words, and then a few more. " * 40 for i in range(200)]
        rows = datasets.Dataset.from_dict({"text": texts})
        return rows.to_iterable_dataset()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub.config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", hub.model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", hub.tokenizer)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", hub.bridge)
    monkeypatch.setattr(datasets, "load_dataset", hub.data_set)
    return hub


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_asks_the_hub_for_its_model_and_text_and_trains(
    path: Path, hub: Hub, tmp_path: Path
) -> None:
    text = path.read_text()
    for name, value in SMALLER.items():
        text = re.sub(rf"\b{name}: [\w.]+", f"{name}: {value}", text)
    smaller = tmp_path / path.name
    smaller.write_text(text)
    ended = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    own = [f"--trainer.default_root_dir={tmp_path}/run", *ended]
    quiet = ["--progress_bar.refresh_rate=0", "--checkpoint.every_n_steps=400000"]
    cli = main(["fit", f"--config={smaller}", *own, *quiet])
    assert cli.trainer.global_step > 0
    model, corpus = (re.search(rf"^    {key}: (\S+)", text, re.M)[1] for key in ("model", "text"))  # type: ignore[index]
    assert hub.asked == [model, corpus]
