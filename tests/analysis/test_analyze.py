"""`lightning-sae analyze` on the model that comes with the package."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sae import ActivationDataModule, FeatureStore, ReLUSAE, load
from lightning_sae.analysis.analyze import analyze, data_of, main
from lightning_sae.analysis.rare_latents import furthest_inputs
from lightning_sae.analysis.unembedding import unembedding_of

HOOK, TOKENS, LENGTH = "blocks.1.hook_resid_post", 1024, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE, and its analysis beside it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("analysis")
    sae = ReLUSAE(128, 48)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
        sae.b_enc[-1] = -1e6
    sae.source = {"model": "embedded", "hook_name": HOOK, "text": "embedded"}
    sae.source |= {"context_length": LENGTH, "drop_special_tokens": True}
    sae.save_pretrained(root / "sae")
    options = ["--output", str(root / "out"), "--tokens", str(TOKENS), "--accelerator", "cpu"]
    main([str(root / "sae"), *options])
    return root


@pytest.fixture(scope="module")
def naive(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens, which were kept, and all latents of all tokens."""
    sae = load(folder / "sae")
    data = data_of(sae, {})
    tokens = data.training_blocks().read(TOKENS // LENGTH)
    x = data.language_model.activations(tokens)
    kept = data.filter.kept(tokens, x)
    return tokens.flatten(), kept.flatten(), sae.encode(x.flatten(0, 1)).detach()


def test_the_table_has_the_figures_of_all_kept_tokens(folder: Path, naive: tuple) -> None:
    _, kept, f = naive
    store, f = FeatureStore(folder / "out"), f[kept]
    assert store.results["tokens"] == len(f)
    assert store.results["left_out"] == int((~kept).sum()) > 0
    frequency = (f > 0).float().mean(0)
    assert store.table["frequency"].tolist() == pytest.approx(frequency.tolist())
    assert store.table["maximum"].tolist() == pytest.approx(f.amax(0).tolist(), rel=1e-4)
    assert store.results["dead"] == pytest.approx((frequency == 0).float().mean().item())
    assert len(store.where("frequency == 0")) == int((frequency == 0).sum()) > 0


def test_the_inputs_furthest_along_rare_latents_are_found_with_who_fires(
    folder: Path, naive: tuple
) -> None:
    sae, (tokens, kept, f) = load(folder / "sae"), naive
    data = data_of(sae, {})
    rare = torch.zeros(48, dtype=torch.bool)
    rare[3:7] = True
    found = furthest_inputs(sae, rare, data, TOKENS, n=3)
    x = data.language_model.activations(tokens.view(-1, LENGTH)).flatten(0, 1)
    directions = sae.W_enc.T[rare]
    along = (sae.encoder_input(x) @ directions.mean(0)) / directions.mean(0).norm()
    order = [i for i in along.argsort(descending=True).tolist() if kept[i]][:3]
    decode = data.language_model.tokenizer.decode
    assert [each.along for each in found] == pytest.approx(along[order].tolist(), rel=1e-4)
    assert [each.token for each in found] == [decode([int(tokens[i])]) for i in order]
    firing = (f[order][:, rare] > 0).float().mean(1)
    assert [each.firing for each in found] == firing.tolist()
    assert furthest_inputs(sae, ~rare & rare, data, TOKENS) == []


def test_data_are_those_of_the_source_unless_given(folder: Path) -> None:
    sae = load(folder / "sae")
    sae.source |= {"document_start": "auto (bos before texts)", "separator": "eos", "pack": False}
    data = data_of(sae, {"context_length": 9})
    found = data.document_start, data.separator, data.pack, data.context_length
    assert found == ("auto", "eos", False, 9)


def test_examples_are_pieces_of_the_text_with_every_tokens_activation(
    folder: Path, naive: tuple
) -> None:
    tokens, kept, f = naive
    f = f * kept.unsqueeze(1)
    store = FeatureStore(folder / "out")
    decode = data_of(load(folder / "sae"), {}).language_model.tokenizer.decode
    latent = int(f.amax(0).argmax())
    examples = store.examples(latent)
    strongest = [e for e in examples if e.interval == 0]
    blocks = f[:, latent].view(-1, LENGTH)
    values, order = blocks.amax(1).topk(len(strongest))
    for example, value, block in zip(strongest, values, order, strict=True):
        at = block * LENGTH + blocks[block].argmax()
        first = int(at) - example.at
        window = slice(first, first + len(example.tokens))
        assert example.activations[example.at] == pytest.approx(value.item(), rel=2e-3)
        assert example.tokens == [decode([t]) for t in tokens[window].tolist()]
        torch.testing.assert_close(
            torch.tensor(example.activations), f[window, latent], rtol=2e-3, atol=1e-3
        )
    assert {e.interval for e in examples} > {0}
    assert store.examples(47) == []
    assert "<h4>" in store.latent(latent)._repr_html_()


def test_special_characters_of_the_text_cannot_become_html(folder: Path) -> None:
    store = copy.copy(FeatureStore(folder / "out"))
    vars(store)["_texts"] = dict.fromkeys(FeatureStore(folder / "out")._texts, "<script>")
    latent = int(store.table["maximum"].idxmax())
    assert "<script>" not in store.latent(latent)._repr_html_()


def test_logits_through_the_unembedding_are_the_models_own_up_to_the_norm() -> None:
    data = ActivationDataModule("blocks.2.hook_resid_post")
    model = data.language_model
    found = unembedding_of(model)
    assert found is not None
    assert found.to_residual is None
    tokens = torch.arange(5, 25).view(1, -1)
    last = max(
        int(name.split(".")[2])
        for name, _ in model.network.named_parameters()
        if name.startswith("gpt_neox.layers.")
    )
    stream = model.at(f"blocks.{last}.hook_resid_post").activations(tokens)[0]
    norm = next(m for n, m in model.network.named_modules() if n.endswith("final_layer_norm"))
    assert isinstance(norm, nn.LayerNorm)
    scale = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    network: Any = model.network
    constant = norm.bias @ network.get_output_embeddings().weight.T
    logits = stream / scale @ found.matrix + constant
    torch.testing.assert_close(logits, model.logits(tokens)[0], rtol=1e-4, atol=1e-4)


def test_an_mlps_activations_reach_the_logits_by_its_output_matrix() -> None:
    model = ActivationDataModule("blocks.1.mlp.hook_post").language_model
    found = unembedding_of(model)
    assert found is not None
    assert found.to_residual is not None
    tokens = torch.arange(5, 25).view(1, -1)
    out = model.at("blocks.1.hook_mlp_out").activations(tokens)
    module: Any = model.site.module
    torch.testing.assert_close(
        model.activations(tokens) @ found.to_residual + module.bias, out, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ({"model": "toy"}, {}, "`hook_name`, `text`"),
        ({}, {}, "give `model`, `hook_name`, `text`"),
        (None, {"tokens": 0}, "`tokens` to be positive"),
        (None, {"hook_name": "blocks.1.mlp.hook_post"}, "width 128"),
    ],
)
def test_what_cannot_be_analysed_is_refused_before_any_work(
    folder: Path, tmp_path: Path, source: dict | None, arguments: dict, message: str
) -> None:
    path = folder / "sae"
    if source is not None:
        sae = load(path)
        sae.source = source
        path = sae.save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match=message):
        analyze(str(path), str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds files"):
        analyze(str(folder / "sae"), str(folder / "out"))
    with pytest.raises(ValueError, match="lacks latents.parquet"):
        FeatureStore(folder / "sae")
    with pytest.raises(ValueError, match="from 0 to 47"):
        FeatureStore(folder / "out").examples(48)
