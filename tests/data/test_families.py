"""Hooks of families whose code differs, and module paths, heads and arguments of the loader."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from benchmarks.models import FAMILIES, HOOKS, network_of, verdict
from lightning_sae.data.load_model import load_language_model
from lightning_sae.data.trial import require_causal

TOKENS = torch.arange(1, 25).view(2, 12)
HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_are_those_of_the_familys_own_code_or_refused(name: str) -> None:
    network = network_of(FAMILIES[name])
    found = [verdict(network, FAMILIES[name], hook) for hook in HOOKS]
    experts = HOOKS[5:]
    refused = {"Mixtral": experts, "Qwen2 MoE": experts, "Mamba": HOOKS[2:]}.get(name, ())
    assert found == ["refused" if hook in refused else "exact" for hook in HOOKS]


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.mlp.down_proj:in"])
def test_a_modules_path_is_a_hook(models: dict[str, Path], path: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(models["llama"])
    model = load_language_model(network, path)
    hook = "mlp.hook_post" if path.endswith(":in") else "hook_mlp_out"
    named = load_language_model(network, f"blocks.1.{hook}")
    assert torch.equal(model.activations(TOKENS), named.activations(TOKENS))
    assert torch.equal(
        model.logits(TOKENS, torch.zeros_like), named.logits(TOKENS, torch.zeros_like)
    )


@pytest.mark.parametrize(
    "path", ["model.layers.7.mlp", "model.layers.1.mlp:side", "model.rotary_emb"]
)
def test_a_path_without_a_vector_for_each_token_is_refused(
    models: dict[str, Path], path: str
) -> None:
    with pytest.raises(ValueError, match="Expected argument `hook_name`"):
        load_language_model(models["llama"], path)


@pytest.mark.parametrize("name", ["attn.hook_z", "attn.hook_k"])
def test_one_head_is_read_and_replaced_alone(models: dict[str, Path], name: str) -> None:
    every = load_language_model(models["llama"], f"blocks.1.{name}")
    one = load_language_model(models["llama"], f"blocks.1.{name}", head=1)
    own = slice(one.width(), 2 * one.width())
    assert one.width() == 4
    assert torch.equal(one.activations(TOKENS), every.activations(TOKENS)[..., own])

    def without(activations: Any) -> Any:
        activations = activations.clone()
        activations[..., own] = 0
        return activations

    zeroed = one.logits(TOKENS, torch.zeros_like)
    assert torch.equal(zeroed, every.logits(TOKENS, without))
    assert not torch.equal(zeroed, every.logits(TOKENS))


@pytest.mark.parametrize(
    ("hook", "head", "message"),
    [(HOOK, 0, "a hook with heads"), ("blocks.1.attn.hook_z", 4, "`head` to be from 0 to 3 but")],
)
def test_a_head_that_is_not_there_is_refused(
    models: dict[str, Path], hook: str, head: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_language_model(models["llama"], hook, head=head)


def test_a_hook_with_heads_before_positions_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="a vector for each token but .*hook_pattern"):
        load_language_model(models["llama"], "blocks.1.attn.hook_pattern")


def test_rows_of_final_give_the_logits(models: dict[str, Path]) -> None:
    for family in models:
        model = load_language_model(models[family], HOOK)
        final = model.final(TOKENS, torch.zeros_like)
        assert final.shape == (2, 12, 16)
        logits = torch.cat([model.unembed(rows) for rows in final.flatten(0, 1).split(5)])
        expected = model.logits(TOKENS, torch.zeros_like).flatten(0, 1)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_dtype_is_the_checkpoints_unless_asked_for(
    models: dict[str, Path], tmp_path: Path, tokenizer: Any
) -> None:
    AutoModelForCausalLM.from_pretrained(models["llama"]).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_language_model(tmp_path, HOOK)
    assert model.activations(TOKENS).dtype == torch.bfloat16
    assert model.identity["model_dtype"] == "bfloat16"
    single = load_language_model(tmp_path, HOOK, torch.float32)
    assert single.activations(TOKENS).dtype == torch.float32


def test_an_encoder_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=300, intermediate_size=24, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a causal language model but .* as in an encoder"):
        load_language_model(tmp_path, HOOK)


def test_rounding_by_what_else_is_in_the_batch_is_no_encoder_in_a_quantized_model() -> None:
    def rounded(tokens: torch.Tensor) -> torch.Tensor:
        """Logits of a causal model, moved a little by the last token, as 8-bit products do."""
        own = torch.nn.functional.one_hot(tokens, 16).float()
        return own + 1e-3 * tokens[:, -1:, None]

    tokens = torch.arange(14).view(2, 7)
    require_causal(rounded, tokens, "it", quantized=True)
    with pytest.raises(ValueError, match="a later token changes"):
        require_causal(rounded, tokens, "it")
    with pytest.raises(ValueError, match="a later token changes"):
        require_causal(lambda t: rounded(t) + t.sum(1)[:, None, None], tokens, "it", quantized=True)


def test_a_model_that_does_not_run_is_refused(models: dict[str, Path]) -> None:
    network = AutoModelForCausalLM.from_pretrained(models["llama"])
    network.model.layers[0].mlp.up_proj = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="a model that runs but .* in RuntimeError: mat1 and mat2"):
        load_language_model(network, HOOK)


def test_an_adapter_is_its_model_changed(models: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    network = AutoModelForCausalLM.from_pretrained(models["llama"])
    adapted = peft.get_peft_model(network, config)
    adapted.save_pretrained(tmp_path)
    model = load_language_model(tmp_path, HOOK)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(TOKENS), adapted(TOKENS).logits)


def test_an_adapter_without_peft_is_refused(tmp_path: Path) -> None:
    if importlib.util.find_spec("peft") is not None:
        pytest.skip("peft is installed")
    base = {"base_model_name_or_path": "some/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    with pytest.raises(ValueError, match="is a PEFT adapter, and peft is not installed"):
        load_language_model(tmp_path, HOOK)


def test_a_token_above_the_embedding_is_named(models: dict[str, Path]) -> None:
    model = load_language_model(models["llama"], HOOK)
    with pytest.raises(ValueError, match=f"tokens below {model.vocabulary}.* got token 5000"):
        model.activations(torch.tensor([[1, 5000]]))


def test_arguments_reach_the_model_or_are_refused(models: dict[str, Path]) -> None:
    model = load_language_model(
        models["llama"], HOOK, model_kwargs={"attn_implementation": "eager"}
    )
    assert model.network.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="got `torch_dtype`: set `model_dtype`"):
        load_language_model(models["llama"], HOOK, model_kwargs={"torch_dtype": "float16"})
    with pytest.raises(ValueError, match="Could not load the weights .*'attn_typo'"):
        load_language_model(models["llama"], HOOK, model_kwargs={"attn_typo": 1})
