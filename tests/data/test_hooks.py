from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from lightning_sae.data.hooks import Site, edited, lens_site, native_block
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.load_model import load_language_model

FAMILIES = ("neox", "gpt2", "llama")
COMMON = {  # with the modules that do not run when the hook of layer 1 is read
    "hook_resid_pre": ("attention", "mlp", "mlp_out"),
    "hook_resid_post": (),
    "hook_attn_out": ("mlp", "mlp_out"),
    "hook_mlp_out": (),
    "attn.hook_z": ("attention", "mlp", "mlp_out"),
    "mlp.hook_post": ("mlp", "mlp_out"),
}
PARTS = {  # of block 1
    "neox": ("gpt_neox.layers.1", "attention", "mlp", "mlp.dense_4h_to_h"),
    "gpt2": ("transformer.h.1", "attn", "mlp", "mlp.c_proj"),
    "llama": ("model.layers.1", "self_attn", "mlp", "mlp.down_proj"),
}
TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bridge(models: dict[str, Path], family: str) -> Any:
    return TransformerBridge.boot_transformers(str(models[family]), device="cpu")


@pytest.fixture
def network(models: dict[str, Path], family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(models[family]).eval()


@pytest.fixture(scope="module")
def model(models: dict[str, Path], family: str) -> LanguageModel:
    """The plain model; a test sets its site."""
    return load_language_model(models[family], "blocks.1.hook_resid_pre")


def read_by_bridge(bridge: Any, hook_name: str) -> Tensor:
    found: list[Tensor] = []
    with torch.no_grad():
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(hook_name, lambda x, hook: found.append(x))])
    return found[0].flatten(2)


def logits_by_bridge(bridge: Any, hook_name: str) -> Tensor:
    with torch.no_grad():
        return bridge.run_with_hooks(TOKENS, fwd_hooks=[(hook_name, lambda x, hook: 0.5 * x)])


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("hook", COMMON)
def test_a_native_site_is_what_transformer_lens_calls_by_that_name(
    model: LanguageModel, bridge: Any, hook: str
) -> None:
    for layer in range(3):
        name = f"blocks.{layer}.{hook}"
        model = model.at(name)
        expected = read_by_bridge(bridge, name)
        torch.testing.assert_close(model.activations(TOKENS), expected, atol=1e-5, rtol=0)
        halved = model.logits(TOKENS, lambda activation: 0.5 * activation)
        expected = logits_by_bridge(bridge, name)
        torch.testing.assert_close(halved, expected, atol=1e-5, rtol=0)
        if (layer, hook) != (2, "hook_resid_post"):  # the last norm would undo it
            assert (halved - model.logits(TOKENS)).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
@pytest.mark.parametrize(
    "name", ["blocks.1.ln2.hook_normalized", "hook_embed", "blocks.2.attn.hook_q"]
)
def test_other_hooks_are_those_of_the_bridge(
    models: dict[str, Path], family: str, bridge: Any, name: str
) -> None:
    model = load_language_model(models[family], name)
    assert model.site.module is lens_site(model.network, name).module
    expected = read_by_bridge(bridge, name)
    torch.testing.assert_close(model.activations(TOKENS), expected, atol=1e-5, rtol=0)
    halved = model.logits(TOKENS, lambda activation: 0.5 * activation)
    torch.testing.assert_close(halved, logits_by_bridge(bridge, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("hook", COMMON)
def test_nothing_behind_the_hook_is_computed(
    models: dict[str, Path], family: str, hook: str
) -> None:
    model = load_language_model(models[family], f"blocks.1.{hook}")
    block, *parts = PARTS[family]
    names = dict(zip(("attention", "mlp", "mlp_out"), parts, strict=True))
    finished: list[nn.Module] = []
    for module in model.network.modules():
        module.register_forward_hook(lambda ended, args, output: finished.append(ended))
    model.activations(TOKENS)

    def ran(path: str) -> bool:
        return model.network.get_submodule(path) in finished

    assert ran(block[:-1] + "0")
    assert not ran(block[:-1] + "2")
    assert not ran("")
    for skipped in COMMON[hook]:
        assert not ran(f"{block}.{names[skipped]}")


def test_no_hook_stays_behind(models: dict[str, Path], family: str) -> None:
    model = load_language_model(models[family], "blocks.1.hook_resid_pre")
    before, clean = n_hooks(model.network), model.logits(TOKENS)

    def broken(activation: Tensor) -> Tensor:
        raise RuntimeError("broken edit")

    model.activations(TOKENS)
    assert n_hooks(model.network) == before
    model.logits(TOKENS, torch.zeros_like)
    assert n_hooks(model.network) == before
    with pytest.raises(RuntimeError, match="broken edit"):
        model.logits(TOKENS, broken)
    assert n_hooks(model.network) == before
    assert torch.equal(model.logits(TOKENS), clean)


def test_heads_are_given_side_by_side_and_put_back(bridge: Any) -> None:
    site = lens_site(bridge, "blocks.1.attn.hook_z")
    seen: list[tuple[int, ...]] = []

    def edit(activation: Tensor) -> Tensor:
        seen.append(tuple(activation.shape))
        return activation

    with torch.no_grad(), edited(site, edit, (2, 12)):
        assert torch.equal(bridge(TOKENS), bridge(TOKENS))
    assert seen == [(2, 12, 16)] * 2


@pytest.mark.parametrize("side", ["input", "output"])
def test_other_arguments_and_results_of_a_module_are_left_alone(side: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x, y

    module, x, y = Two(), torch.ones(1, 2, 3), torch.ones(1)
    with edited(Site(module, side), lambda activation: activation * 2, (1, 2)):
        doubled, same = module(x, y)
    assert torch.equal(doubled, 2 * x)
    assert same is y


def test_a_layer_out_of_range_is_refused(network: Any) -> None:
    with pytest.raises(ValueError, match="a layer from 0 to 2 but got .*the model has 3 layers"):
        native_block(network, "blocks.3.hook_resid_post")
    assert native_block(network, "blocks.2.hook_resid_post") is not None


def test_an_unknown_hook_is_refused_with_names_that_are_close(bridge: Any) -> None:
    with pytest.raises(ValueError, match=r"similar ones are: .*blocks.1.hook_resid_post.* 0 to 2"):
        lens_site(bridge, "blocks.1.resid_post")
    with pytest.raises(ValueError, match="similar ones are: none"):
        lens_site(bridge, "&%!")
