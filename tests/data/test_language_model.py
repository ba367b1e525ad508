import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from lightning_sae.data.load_model import load_language_model

HOOK = "blocks.1.hook_resid_post"
TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.fixture
def network(models: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["llama"])


def test_a_folder_is_loaded_with_its_tokenizer_ready_to_be_read(
    models: dict[str, Path], tokenizer: Any
) -> None:
    model = load_language_model(models["llama"], HOOK)
    assert (model.name, model.hook_name) == (str(models["llama"]), HOOK)
    assert model.context_length == 64
    assert model.width() == 16
    assert model.device == torch.device("cpu")
    assert model.tokenizer("the cat").input_ids == tokenizer("the cat").input_ids
    assert not model.network.training
    assert not any(weight.requires_grad for weight in model.network.parameters())
    assert model.to("cpu") is model


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.attn.hook_q"])
def test_weights_are_loaded_in_the_dtype_asked_for(models: dict[str, Path], hook_name: str) -> None:
    model = load_language_model(models["llama"], hook_name, torch.bfloat16)
    assert model.activations(TOKENS).dtype == torch.bfloat16
    model = load_language_model(models["llama"], hook_name)
    assert model.activations(TOKENS).dtype == torch.float32


def test_logits_are_the_models_own(network: Any, models: dict[str, Path]) -> None:
    model = load_language_model(models["llama"], HOOK)
    with torch.no_grad():
        expected = network.eval()(TOKENS).logits
    torch.testing.assert_close(model.logits(TOKENS), expected)
    assert torch.equal(model.logits(TOKENS, lambda activation: activation), model.logits(TOKENS))


def test_an_edit_at_the_last_block_reaches_the_logits_only_where_it_acts(
    models: dict[str, Path],
) -> None:
    model = load_language_model(models["llama"], "blocks.2.hook_resid_post")
    at_five = torch.zeros(1, 12, 1)
    at_five[:, 5] = 1.0
    edited = model.logits(TOKENS, lambda activation: activation * (1 - at_five))
    changed = (edited - model.logits(TOKENS)).abs().amax((0, 2)) > 1e-3
    assert changed.nonzero().flatten().tolist() == [5]


def test_an_instance_of_a_plain_model_is_taken_as_it_is(
    network: Any, models: dict[str, Path]
) -> None:
    model = load_language_model(network, HOOK)
    assert model.network is network
    assert model.name == str(models["llama"])
    assert not network.training
    expected = load_language_model(models["llama"], HOOK).activations(TOKENS)
    assert torch.equal(model.activations(TOKENS), expected)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.attn.hook_q"])
def test_an_instance_of_a_bridge_is_taken_as_it_is(models: dict[str, Path], hook_name: str) -> None:
    bridge = TransformerBridge.boot_transformers(str(models["llama"]), device="cpu")
    model = load_language_model(bridge, hook_name)
    assert model.network is bridge
    assert model.tokenizer is bridge.tokenizer
    assert model.context_length == 64
    expected = load_language_model(models["llama"], hook_name)
    torch.testing.assert_close(model.activations(TOKENS), expected.activations(TOKENS))
    torch.testing.assert_close(
        model.logits(TOKENS, torch.zeros_like), expected.logits(TOKENS, torch.zeros_like)
    )


def test_threads_take_turns(models: dict[str, Path]) -> None:
    """One reads ahead for training while another validates, with hooks on the same modules."""
    model = load_language_model(models["llama"], HOOK)
    tokens = [TOKENS, TOKENS + 30]
    expected = [model.activations(t) for t in tokens]
    clean, zeroed = model.logits(TOKENS), model.logits(TOKENS, torch.zeros_like)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            reads = [threads.submit(model.activations, tokens[i % 2]) for i in range(40)]
            edits = [threads.submit(model.logits, TOKENS, torch.zeros_like) for _ in range(20)]
            plain = [threads.submit(model.logits, TOKENS) for _ in range(20)]
        for i, read in enumerate(reads):
            assert torch.equal(read.result(), expected[i % 2])
        assert all(torch.equal(edit.result(), zeroed) for edit in edits)
        assert all(torch.equal(logits.result(), clean) for logits in plain)
    finally:
        sys.setswitchinterval(interval)


def test_a_hook_that_the_forward_pass_never_reaches_is_refused(network: Any) -> None:
    network.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`unused` was not: .*choose another hook"):
        load_language_model(network, "unused")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "there is no folder /nowhere/model: check the path"),
        ("./model", "there is no folder ./model: check the path"),
        ("a/b/c", "there is no folder a/b/c: check the path"),
        (Path("model"), "there is no folder model: check the path"),
        ("nobody/nothing", "nobody/nothing: it is not a local folder.*HF_HUB_OFFLINE is set"),
    ],
)
def test_a_model_that_cannot_be_found_is_refused(name: str | Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_language_model(name, HOOK)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no causal language model"):
        load_language_model(tmp_path, HOOK)


@pytest.mark.parametrize("is_instance", [False, True])
def test_a_layer_out_of_range_is_refused(
    network: Any, models: dict[str, Path], is_instance: bool
) -> None:
    model = network if is_instance else models["llama"]
    with pytest.raises(ValueError, match="a layer from 0 to 2 but got `blocks.7.hook_resid_post`"):
        load_language_model(model, "blocks.7.hook_resid_post")


def test_an_unknown_hook_is_refused(network: Any, models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="similar ones are: .*blocks.1.hook_resid_post"):
        load_language_model(models["llama"], "blocks.1.hook_resid")
    with pytest.raises(ValueError, match="plain `transformers` model .* but got .*hook_resid"):
        load_language_model(network, "blocks.1.hook_resid")


def test_an_instance_may_have_no_tokenizer(network: Any) -> None:
    network.config.name_or_path = ""
    assert load_language_model(network, HOOK).tokenizer is None


def test_a_hook_of_a_model_that_transformer_lens_does_not_take_is_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot_transformers(name: str, **arguments: Any) -> None:
        raise ValueError("no adapter")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot_transformers)
    with pytest.raises(ValueError, match="cannot load.*choose a common hook.*no adapter"):
        load_language_model(models["llama"], "blocks.1.ln2.hook_normalized")
