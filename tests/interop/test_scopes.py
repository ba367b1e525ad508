"""Gemma Scope's, Llama Scope's and OpenAI's files, against their forward passes written out."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lightning_sae
from lightning_sae import JumpReLUSAE, ReLUSAE, TopKSAE
from lightning_sae.interop import export
from tests.interop.conftest import KINDS

D_IN, D_SAE = 6, 20


def jumped(pre: Tensor, threshold: Tensor) -> Tensor:
    return pre.relu() * (pre > threshold)


def top_k(pre: Tensor, k: int) -> Tensor:
    values, places = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


def gemma(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    w = {name: torch.from_numpy(array) for name, array in np.load(folder / "params.npz").items()}
    f = jumped(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


def llama(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    assert int(config["d_model"] * config["expansion_factor"]) == D_SAE
    s = 1.0
    if config["norm_activation"] == "dataset-wise":
        norm = w[f"dataset_average_activation_norm.{config['hook_point_in']}"]
        s = math.sqrt(D_IN) / norm.item()
    pre = s * x @ w["W_E"] + w["b_E"]
    norms = w["W_D"].norm(dim=-1) if config["sparsity_include_decoder_norm"] else 1.0
    if config["act_fn"] == "jumprelu":
        theta = w["activation_function.log_jumprelu_threshold"].exp()
        f = pre * (pre * norms > theta)
    else:
        f = (
            pre.relu()
            if config["act_fn"] == "relu"
            else top_k(pre * norms, config["top_k"]) / norms
        )
    return f, (f @ w["W_D"] + w["b_D"]) / s


def openai(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.load(folder / "autoencoder.pt", weights_only=True)
    assert w["activation"] == "ReLU"
    f = ((x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]).relu()
    return f, f @ w["decoder.weight"].T + w["pre_bias"]


FORWARD = {"gemma_scope": gemma, "llama_scope": llama, "openai": openai}
RELU = ("relu", "relu, no centring", "tied", "matryoshka, relu", "rescaled")
REFUSED = {
    "gemma_scope": ("topk", "gated", "gated, no centring", "rescale and shift"),
    "llama_scope": ("gated", "gated, no centring", "rescale and shift"),
    "openai": tuple(name for name in KINDS if name not in RELU),
}


@pytest.mark.parametrize("format", FORWARD)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_computes_the_same_there_and_back_or_is_refused(
    name: str,
    format: str,
    sae_of: Callable[..., Any],
    there_and_back: Callable[..., tuple[Path, Any]],
    tmp_path: Path,
) -> None:
    sae = sae_of(name)
    if name in REFUSED[format]:
        with pytest.raises(ValueError, match=rf"The format {format} cannot hold.* The nearest: `"):
            export(sae, tmp_path / "out", format)
        return
    if format == "openai":
        with pytest.warns(UserWarning, match="as of no model and hook"):
            there_and_back(sae, format, FORWARD[format])
    else:
        _, back = there_and_back(sae, format, FORWARD[format])
        assert back.source["hook_name"] == sae.source["hook_name"]


# Files of their own.


def tensors() -> dict[str, Tensor]:
    """Random weights, by Gemma Scope's names."""
    return {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
        "threshold": torch.rand(D_SAE),
    }


def test_gemma_scope_is_known_by_its_folders(tmp_path: Path, x: Tensor) -> None:
    folder = tmp_path / "models--google--gemma-scope-2b-pt-att" / "layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {n.replace("W", "w"): w.numpy() for n, w in tensors().items()}
    np.savez(folder / "params.npz", **arrays)
    with pytest.warns(UserWarning, match="the model and hook that its folders are named after"):
        sae = lightning_sae.load(folder)
    assert isinstance(sae, JumpReLUSAE)
    assert sae.source["model"] == "google/gemma-2-2b"
    assert sae.source["hook_name"] == "blocks.20.attn.hook_z"


def test_gemma_scope_2_says_where_it_is_from(
    tmp_path: Path, x: Tensor, assert_same: Callable[..., None]
) -> None:
    w = tensors()
    save_file({name.replace("W", "w"): t for name, t in w.items()}, tmp_path / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "width": D_SAE,
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.13.post_feedforward_layernorm.output",
        "l0": 60,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae = lightning_sae.load(tmp_path)
    f = jumped(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    assert_same((sae.encode(x), sae(x)), (f, f @ w["W_dec"] + w["b_dec"]))
    assert sae.source["hook_name"] == "blocks.13.hook_mlp_out"
    assert sae.source["imported"]["l0"] == 60
    (tmp_path / "config.json").write_text(json.dumps({**config, "hf_hook_point_out": "elsewhere"}))
    with pytest.raises(ValueError, match="it is a transcoder"):
        lightning_sae.load(tmp_path)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_llamascopium_is_read_with_its_scale_and_norms(
    activation: str, norms: bool, tmp_path: Path, x: Tensor, assert_same: Callable[..., None]
) -> None:
    w = tensors()
    theta = w.pop("threshold")
    hook = "blocks.2.hook_resid_post"
    content = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    content[f"dataset_average_activation_norm.{hook}"] = torch.tensor(5.0)
    if activation == "jumprelu":
        content["activation_function.log_jumprelu_threshold"] = theta.log()
    save_file(content, tmp_path / "sae_weights.safetensors")
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN + 1e-9,
        "act_fn": activation,
        "top_k": 4,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": norms,
        "hook_point_in": hook,
        "hook_point_out": hook,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    f, x_hat = llama(tmp_path, x)
    sae = lightning_sae.load(tmp_path)
    if activation == "topk" and norms:
        f = f * w["W_dec"].norm(dim=-1)
        assert "times the norms of decoder rows" in sae.source["imported"]["units"]
    assert_same((sae.encode(x), sae(x)), (f, x_hat))
    assert sae.source["hook_name"] == hook


@pytest.mark.parametrize("norms", [True, False])
def test_the_first_llama_scope_is_in_raw_units(
    norms: bool, tmp_path: Path, x: Tensor, assert_same: Callable[..., None]
) -> None:
    w = tensors()
    theta, average = 0.3, 5.0
    (tmp_path / "checkpoints").mkdir()
    content = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    content |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
    save_file(contiguous, tmp_path / "checkpoints" / "final.safetensors")
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": "blocks.8.hook_resid_post",
        "hook_point_out": "blocks.8.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": theta,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": average, "out": average},
        "sparsity_include_decoder_norm": norms,
        "top_k": 50,
    }
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    s = math.sqrt(D_IN) / average
    n = w["W_dec"].norm(dim=-1) if norms else torch.ones(D_SAE)
    pre = (x @ w["W_enc"] + w["b_enc"] / s) * n
    f = jumped(pre, torch.tensor(theta))
    sae = lightning_sae.load(tmp_path)
    assert_same((sae.encode(x), sae(x)), (f, f / n @ w["W_dec"] + w["b_dec"] / s))
    # As SAELens has it, where rows are of norm 1: scaled latents, and so a scaled threshold.
    scaled = s * x @ w["W_enc"] + w["b_enc"]
    if not norms:
        assert torch.equal(scaled.relu() * (scaled > theta * s) > 0, f > 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sae_type": "clt"}, "`sae_type` is 'clt'"),
        ({"hook_point_out": "elsewhere"}, "it is a transcoder"),
        ({"use_glu_encoder": True}, "gated linear unit"),
        ({"act_fn": "batchtopk"}, "latents depend on the batch.*convert it to jumprelu"),
        ({"norm_activation": "token-wise"}, "'token-wise'.* which decoding cannot undo"),
        ({"norm_activation": "dataset-wise"}, "is None, not a positive number"),
        ({"expansion_factor": 8}, "`d_sae` is 48 but the weights are 20 wide"),
    ],
)
def test_what_of_llama_scope_no_sae_here_computes_is_refused(
    config: dict[str, Any], message: str, sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    sae = sae_of("relu")
    sae.source = {}
    folder = export(sae, tmp_path / "out", "llama_scope")
    own = json.loads((folder / "config.json").read_text())
    own["hook_point_in"] = own["hook_point_out"] = "blocks.0.hook_resid_post"
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    with pytest.raises(ValueError, match=rf"^Could not read .*{message}"):
        lightning_sae.load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_openai_top_k_wants_normalised_rows(
    tied: bool, tmp_path: Path, x: Tensor, assert_same: Callable[..., None]
) -> None:
    w = tensors()
    path = tmp_path / "8.pt"
    decoder = {"decoder.linear.weight": w["W_enc"].T} if tied else {"decoder.weight": w["W_dec"].T}
    content = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"].T,
        **decoder,
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "activation": "TopK",
        "activation_state_dict": {"k": 4, "postact_fn": "ReLU"},
        "activation.k": 4,
        "activation.postact_fn": "ReLU",
    }
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"`decode` cannot undo.*`format='openai_normalised'`"):
        lightning_sae.load(path)
    with pytest.warns(UserWarning, match="as of no model and hook"):
        sae = lightning_sae.load(path, format="openai_normalised")
    assert isinstance(sae, TopKSAE)
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = (x - mean) / (deviation + 1e-5)
    f = top_k((z - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 4)
    W_dec = w["W_enc"].T if tied else w["W_dec"]
    x_hat = (f @ W_dec + w["b_dec"]) * deviation + mean
    assert_same((sae.encode(z), sae(z) * deviation + mean), (f, x_hat))


def test_openai_relu_is_read_from_a_file(tmp_path: Path) -> None:
    w = tensors()
    content = {"pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "encoder.weight": w["W_enc"].T}
    torch.save({**content, "decoder.weight": w["W_dec"].T, "activation": "ReLU"}, tmp_path / "0.pt")
    with pytest.warns(UserWarning, match="as of no model and hook"):
        assert isinstance(lightning_sae.load(tmp_path / "0.pt"), ReLUSAE)
