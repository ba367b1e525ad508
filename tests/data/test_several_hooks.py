"""One pass of the model for several hooks gives what one pass for each would give."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import ActivationDataModule
from lightning_sae.data.load_model import load_language_model
from lightning_sae.data.several_hooks import load_at_hooks

HOOKS = ["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.0.hook_resid_pre"]


@pytest.fixture
def make_data(text_file: Path, models: dict[str, Path]) -> Any:
    def make(hook_name: str | list[str], **arguments: Any) -> ActivationDataModule:
        settings = {
            "model": models["llama"],
            "text": text_file,
            "validation_fraction": 0.2,
            "context_length": 16,
            "blocks_per_pass": 4,
            "batch_size": 16,
            "buffer_size": 128,
            "center": True,
            "scale": True,
            **arguments,
        }
        return ActivationDataModule(hook_name, **settings)

    return make


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_activations_are_those_of_each_hook_alone(models: dict[str, Path], family: str) -> None:
    tokens = torch.randint(300, (3, 10))
    model = load_at_hooks(models[family], HOOKS, torch.float32)
    found = model.split(model.activations(tokens))
    assert list(found) == HOOKS
    for name in HOOKS:
        alone = load_language_model(models[family], name)
        assert torch.equal(found[name], alone.activations(tokens))
        assert model.widths[name] == alone.width()


def test_a_pass_ends_at_the_deepest_hook(models: dict[str, Path]) -> None:
    model = load_at_hooks(models["llama"], HOOKS, torch.float32)
    ran: list[int] = []
    layers: Any = model.network.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    model.activations(torch.zeros(1, 4, dtype=torch.long))
    assert ran == [0, 1]  # hook by hook it would be 0, 1, 0, 0; to the end 0, 1, 2


def test_hooks_that_transformer_lens_alone_knows_go_with_others(models: dict[str, Path]) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.0.attn.hook_q"]
    model = load_at_hooks(models["neox"], hooks, torch.float32)
    found = model.split(model.activations(torch.zeros(1, 4, dtype=torch.long)))
    assert {name: part.shape for name, part in found.items()} == dict.fromkeys(hooks, (1, 4, 16))


def test_batches_are_those_of_each_hook_alone(make_data: Any) -> None:
    together = make_data(HOOKS)
    batches = together.train_dataloader()
    scaled = {name: together.at(name).scaling() for name in HOOKS}
    rows = [batch for batch, _ in zip(batches, range(12), strict=False)]
    for name in HOOKS:
        data = make_data(name)
        assert together.d_in[name] == data.d_in == together.at(name).d_in
        loader = iter(data.train_dataloader())
        mean, scale = data.scaling()
        assert torch.equal(scaled[name].mean, mean)
        assert torch.equal(scaled[name].scale, scale)
        assert all(torch.equal(batch[name], next(loader)) for batch in rows)
        assert together.at(name).source == data.source


def test_held_out_batches_are_those_of_each_hook_alone(make_data: Any) -> None:
    rows = list(make_data(HOOKS, n_validation=128).val_dataloader())
    for name in HOOKS:
        alone = list(make_data(name, n_validation=128).val_dataloader())
        assert len(rows) == len(alone)
        assert all(torch.equal(batch[name], x) for batch, x in zip(rows, alone, strict=True))


def test_a_row_too_long_at_one_hook_is_left_out_at_all(make_data: Any) -> None:
    data = make_data(HOOKS[:2], max_norm_multiple=1e6)
    tokens = torch.arange(1, 33).view(2, 16)
    wide = data.language_model.activations(tokens)
    for name, start in zip(HOOKS, (0, data.d_in[HOOKS[0]]), strict=False):
        row = wide.clone()
        assert data.filter.kept(tokens, row).all()
        row[1, 5, start] = 1e9
        kept = data.filter.kept(tokens, row)
        assert kept.sum() == kept.numel() - 1, name
        assert not kept[1, 5]


def test_a_resumed_run_must_have_the_same_hooks_in_the_same_order(make_data: Any) -> None:
    data = make_data(HOOKS)
    next(iter(data.train_dataloader()))
    state = data.state_dict()
    data.teardown("fit")
    for hooks in (HOOKS[::-1], HOOKS[:2], HOOKS[0]):
        other = make_data(hooks)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match="as in the checkpoint, but got"):
            other.train_dataloader()


@pytest.mark.parametrize("hooks", [[], [HOOKS[0], HOOKS[0]]])
def test_hooks_are_named_once(make_data: Any, hooks: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Expected argument `hook_name` .* name each once"):
        make_data(hooks)


def test_an_unknown_hook_is_named(make_data: Any) -> None:
    with pytest.raises(ValueError, match=r"blocks\.7\.hook_resid_post"):
        _ = make_data([HOOKS[0], "blocks.7.hook_resid_post"]).d_in
