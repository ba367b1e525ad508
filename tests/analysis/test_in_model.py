import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lightning_sae import ActivationDataModule, ReLUSAE
from lightning_sae.analysis.in_model import evaluate_in_model
from lightning_sae.data.embedded import EMBEDDED_MODEL

HOOK = "blocks.1.hook_resid_post"
BOS = 0
N = 256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some Python in documents of ten lines, so that BOS tokens stand within blocks."""
    lines = Path(json.__file__).with_name("decoder.py").read_text().splitlines()
    documents = ["\n".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]
    path = tmp_path_factory.mktemp("text") / "decoder.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


@pytest.fixture(scope="module")
def bridge() -> Any:
    return TransformerBridge.boot_transformers(str(EMBEDDED_MODEL), device="cpu")


def make_data(text: Path, **arguments: Any) -> ActivationDataModule:
    settings = {"validation_fraction": 0.5, "context_length": 32, "blocks_per_pass": 4, **arguments}
    return ActivationDataModule(HOOK, text=text, **settings)


def sae_that_multiplies(factor: float, d_in: int = 128) -> ReLUSAE:
    """x = relu(x) - relu(-x), so this SAE gives `factor` times x, exactly."""
    sae = ReLUSAE(d_in, 2 * d_in, b_dec_init="zero")
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(factor * torch.cat([eye, -eye]))
    return sae


def test_an_sae_that_reconstructs_exactly_costs_nothing(text: Path) -> None:
    figures = evaluate_in_model(sae_that_multiplies(1.0), make_data(text), N)
    assert figures["ce_spliced"] == pytest.approx(figures["ce_clean"], abs=1e-5)
    assert figures["kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["loss_recovered_zero"] == pytest.approx(1.0, abs=1e-5)
    assert figures["loss_recovered_mean"] == pytest.approx(1.0, abs=1e-5)
    assert figures["perplexity_spliced"] == pytest.approx(figures["perplexity_clean"], rel=1e-5)
    # The ablations do cost something: recovering all of it says something.
    assert figures["ce_zero_ablation"] > figures["ce_clean"] + 0.5
    assert figures["ce_mean_ablation"] > figures["ce_clean"] + 0.5


def test_padding_is_neither_replaced_nor_counted(text: Path) -> None:
    data = make_data(text, pack=False, keep_rest=False, context_length=200)
    (tokens,) = data.held_out_tokens(800)
    assert (tokens < 0).any()
    figures = evaluate_in_model(sae_that_multiplies(0.5), data, 800)
    assert figures["n_tokens"] == int((tokens[:, 1:] > BOS).sum())
    nats = {"clean": 0.0, "spliced": 0.0}
    for block in tokens:  # each document by itself
        own = block[block >= 0].unsqueeze(0)
        logits = {
            "clean": data.language_model.logits(own),
            "spliced": data.language_model.logits(
                own, lambda x: torch.cat([x[:, :1], 0.5 * x[:, 1:]], 1)
            ),
        }
        for name, found in logits.items():
            p = found[:, :-1].log_softmax(-1).gather(-1, own[:, 1:, None])
            nats[name] -= float(p.sum())
    for name, of_all in nats.items():
        assert figures[f"ce_{name}"] == pytest.approx(of_all / figures["n_tokens"], rel=1e-4)


def test_an_sae_that_gives_zero_is_the_zero_ablation(text: Path) -> None:
    figures = evaluate_in_model(sae_that_multiplies(0.0), make_data(text), N)
    assert figures["ce_spliced"] == figures["ce_zero_ablation"]
    assert figures["ce_spliced"] != pytest.approx(figures["ce_mean_ablation"], abs=1e-3)
    assert figures["loss_recovered_zero"] == 0.0
    assert figures["kl"] > 0.1


def test_an_sae_that_gives_the_mean_is_the_mean_ablation(text: Path) -> None:
    data, sae = make_data(text), sae_that_multiplies(0.0)
    rows = [
        data.language_model.activations(tokens)[tokens != BOS] for tokens in data.held_out_tokens(N)
    ]
    with torch.no_grad():
        sae.b_dec.copy_(torch.cat(rows).mean(0))
    figures = evaluate_in_model(sae, data, N)
    assert figures["ce_spliced"] == pytest.approx(figures["ce_mean_ablation"], abs=1e-5)
    assert figures["loss_recovered_mean"] == pytest.approx(0.0, abs=1e-5)


def naive_figures(
    bridge: Any, blocks: Tensor, kept: Tensor, factor: float
) -> dict[str, float | int]:
    """The same questions by TransformerLens' own hooks, one prediction at a time."""

    def log_probabilities(value: Any) -> Tensor:
        def replace(x: Tensor, hook: Any) -> Tensor:
            new = value.expand_as(x) if isinstance(value, Tensor) else x * value
            return torch.where(kept.unsqueeze(-1), new, x)

        hooks = [] if value is None else [(HOOK, replace)]
        with torch.no_grad():
            return bridge.run_with_hooks(blocks, fwd_hooks=hooks).double().log_softmax(-1)

    with torch.no_grad():
        activations = bridge.run_with_cache(blocks, names_filter=HOOK)[1][HOOK]
    outputs = {
        "ce_clean": log_probabilities(None),
        "ce_spliced": log_probabilities(factor),
        "ce_zero_ablation": log_probabilities(0.0),
        "ce_mean_ablation": log_probabilities(activations[kept].mean(0)),
    }
    sums, n = {**dict.fromkeys(outputs, 0.0), "kl": 0.0}, 0
    for b, block in enumerate(blocks.tolist()):
        for t, target in enumerate(block[1:]):
            if target == BOS:
                continue
            n += 1
            for name, log_p in outputs.items():
                sums[name] -= log_p[b, t, target].item()
            p, q = outputs["ce_clean"][b, t], outputs["ce_spliced"][b, t]
            sums["kl"] += (p.exp() * (p - q)).sum().item()
    return {**{name: total / n for name, total in sums.items()}, "n_tokens": n}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"positions": (4, 20)}, {"drop_special_tokens": False}, {"max_norm_multiple": 1.05}],
)
def test_figures_are_those_of_a_naive_loop_that_leaves_alone_what_training_leaves_out(
    text: Path, bridge: Any, arguments: dict[str, Any]
) -> None:
    data = make_data(text, **arguments)
    passes = list(data.held_out_tokens(N))
    kept = torch.cat([kept_by_hand(data, tokens) for tokens in passes])
    blocks = torch.cat(passes)
    assert (blocks[:, 1:] == BOS).any()
    assert kept.float().mean() > 0.3
    figures = evaluate_in_model(sae_that_multiplies(0.7), data, N)
    expected = naive_figures(bridge, blocks, kept, 0.7)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert figures["n_tokens"] == (blocks[:, 1:] != BOS).sum()


def kept_by_hand(data: ActivationDataModule, tokens: Tensor) -> Tensor:
    kept = tokens != BOS if data.drop_special_tokens else torch.ones_like(tokens, dtype=torch.bool)
    if data.positions is not None:
        kept[:, : data.positions[0]] = False
        kept[:, data.positions[1] :] = False
    if data.max_norm_multiple is not None:
        norms = data.language_model.activations(tokens).norm(dim=-1)
        kept &= norms <= data.max_norm_multiple * norms[kept].median()
    return kept


def test_ratios_are_those_of_the_cross_entropies(text: Path) -> None:
    figures = evaluate_in_model(sae_that_multiplies(0.5), make_data(text), N)
    clean, spliced = figures["ce_clean"], figures["ce_spliced"]
    assert clean < spliced
    for kind in ("zero", "mean"):
        ablated = figures[f"ce_{kind}_ablation"]
        recovered = (ablated - spliced) / (ablated - clean)
        assert figures[f"loss_recovered_{kind}"] == pytest.approx(recovered)
    assert figures["perplexity_clean"] == pytest.approx(math.exp(clean))
    assert figures["perplexity_spliced"] == pytest.approx(math.exp(spliced))
    assert all(type(figure) in (int, float) for figure in figures.values())


def test_a_model_in_half_precision_is_evaluated_by_an_sae_in_single(text: Path) -> None:
    single = evaluate_in_model(sae_that_multiplies(0.5), make_data(text), N)
    half = evaluate_in_model(sae_that_multiplies(0.5), make_data(text, model_dtype="bfloat16"), N)
    assert half == pytest.approx(single, rel=0.05)


def test_the_question_leaves_no_trace(text: Path) -> None:
    data, sae = make_data(text), sae_that_multiplies(0.5)
    first = evaluate_in_model(sae, data, N)
    assert evaluate_in_model(sae, data, N) == first
    assert all(parameter.grad is None for parameter in sae.parameters())
