"""SAELens' folders, against its forward pass written out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lightning_sae
from lightning_sae.interop import export
from tests.interop.conftest import KINDS, own_source, stated

D_IN, D_SAE = 6, 20


def forward(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of a finished SAE, of activations as SAELens gives them to it."""
    config = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    assert config["normalize_activations"] == "none"
    x = x.to(w["W_dec"].dtype)
    xc = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    if config["architecture"] == "gated":
        f = (xc @ w["W_enc"] + w["b_gate"] > 0) * torch.relu(
            xc @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
        )
    else:
        pre = xc @ w["W_enc"] + w["b_enc"]
        f = {
            "standard": lambda: pre.relu(),
            "jumprelu": lambda: pre.relu() * (pre > w["threshold"]),
            "topk": lambda: top_k(pre, config["k"]),
        }[config["architecture"]]()
    return f, f @ w["W_dec"] + w["b_dec"]


def top_k(pre: Tensor, k: int) -> Tensor:
    values, places = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_computes_the_same_there_and_back(
    name: str,
    scaled: bool,
    sae_of: Callable[..., Any],
    there_and_back: Callable[..., tuple[Path, Any]],
) -> None:
    sae = sae_of(name, scaled)
    _, back = there_and_back(sae, "saelens", forward)
    assert own_source(back) == stated()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "topk"])
def test_rows_of_norm_1_leave_reconstructions_alone(
    name: str,
    sae_of: Callable[..., Any],
    x: Tensor,
    assert_same: Callable[..., None],
    tmp_path: Path,
) -> None:
    sae = sae_of(name)
    folder = export(sae, tmp_path / "out", "saelens", unit_decoder=True)
    weights = load_file(folder / "sae_weights.safetensors")
    torch.testing.assert_close(weights["W_dec"].norm(dim=-1), torch.ones(D_SAE))
    assert_same(forward(folder, x), (sae.encode(x) * sae.W_dec.norm(dim=-1), sae(x)))
    written = json.loads((folder / "cfg.json").read_text())["metadata"]["lightning_sae"]
    assert "times the norm of its decoder row" in written["latents"]


def test_the_top_k_of_rows_of_norm_1_would_be_others(
    sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="other pre-activations would be the largest"):
        export(sae_of("topk"), tmp_path / "out", "saelens", unit_decoder=True)
    assert not (tmp_path / "out").exists()


# Files of SAELens' own.


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder as SAELens would, with random weights for what is not given."""

    def written(config: dict[str, Any], **tensors: Tensor) -> Path:
        weights = {
            "W_enc": torch.randn(D_IN, D_SAE),
            "b_enc": torch.randn(D_SAE),
            "W_dec": torch.randn(D_SAE, D_IN),
            "b_dec": torch.randn(D_IN),
            **tensors,
        }
        folder = tmp_path / "theirs"
        folder.mkdir()
        metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_mlp_out"}
        full = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": metadata, **config}
        (folder / "cfg.json").write_text(json.dumps(full))
        save_file(
            {n: w for n, w in weights.items() if w.numel()}, folder / "sae_weights.safetensors"
        )
        return folder

    return written


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def test_a_batch_top_k_in_training_keeps_its_threshold_and_k(
    written: Callable[..., Path], x: Tensor, assert_same: Callable[..., None]
) -> None:
    threshold = torch.tensor(0.9, dtype=torch.float64)
    config = {"architecture": "batchtopk", "k": 2.5, "rescale_acts_by_decoder_norm": True}
    folder = written(config, topk_threshold=threshold)
    w = weights_of(folder)
    norms = w["W_dec"].norm(dim=-1)
    pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    f = pre.relu() * (pre > threshold)
    sae = lightning_sae.load(folder, lightning_sae.BatchTopKSAE)
    assert_same((sae.encode(x), sae(x)), (f, f / norms @ w["W_dec"] + w["b_dec"]))
    assert (sae.k, sae.decoder_norm) == (2.5, "unit")


def test_a_pre_activation_at_the_threshold_is_no_latent(written: Callable[..., Path]) -> None:
    theta = torch.tensor(0.5, dtype=torch.float64)
    zeros = {"W_enc": torch.zeros(D_IN, D_SAE), "b_enc": torch.linspace(0, 1, D_SAE + 1)[1:]}
    folder = written({"architecture": "batchtopk", "k": 2}, topk_threshold=theta, **zeros)
    f = lightning_sae.load(folder).encode(torch.zeros(1, D_IN))
    assert 0.5 in zeros["b_enc"]
    assert torch.equal(f[0] > 0, zeros["b_enc"] > 0.5)


def test_a_threshold_is_exact_in_bfloat16(written: Callable[..., Path]) -> None:
    pre = (1 + torch.arange(D_SAE) / 128).bfloat16()
    zeros = {"W_enc": torch.zeros(D_IN, D_SAE), "b_enc": pre, "W_dec": torch.ones(D_SAE, D_IN)}
    short = {name: tensor.bfloat16() for name, tensor in zeros.items()}
    short |= {"b_dec": torch.zeros(D_IN).bfloat16(), "topk_threshold": pre[5].double()}
    sae = lightning_sae.load(written({"architecture": "batchtopk", "k": 2}, **short))
    assert torch.equal(sae.encode(torch.zeros(1, D_IN))[0] > 0, torch.arange(D_SAE) > 5)


def test_a_matryoshka_in_training_keeps_its_widths(written: Callable[..., Path]) -> None:
    config = {"architecture": "matryoshka_batchtopk", "k": 3.0, "matryoshka_widths": [4, 8]}
    sae: Any = lightning_sae.load(written(config, topk_threshold=torch.tensor(0.1)))
    assert sae.prefixes == (4, 8, D_SAE)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_inputs_that_are_scaled_in_training_are_folded_as_saelens_does(
    architecture: str,
    rescaled: bool,
    written: Callable[..., Path],
    x: Tensor,
    assert_same: Callable[..., None],
) -> None:
    config = {
        "architecture": architecture,
        "k": 4.0,
        "rescale_acts_by_decoder_norm": rescaled,
        "normalize_activations": "expected_average_only_in",
    }
    theta, s = torch.tensor(0.8, dtype=torch.float64), 0.2
    own = {"topk_threshold": theta} if architecture == "batchtopk" else {}
    folder = written(config, **own)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    w = weights_of(folder)
    norms = w["W_dec"].norm(dim=-1) if rescaled else torch.ones(D_SAE)
    pre = ((s * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    f = top_k(pre, 4) if architecture == "topk" else pre.relu() * (pre > theta)
    x_hat = ((f / norms) @ w["W_dec"] + w["b_dec"]) / s
    sae = lightning_sae.load(folder)
    assert_same((sae.encode(x), sae(x)), (f / s if rescaled else f, x_hat))
    assert ("raw" if rescaled else "times 0.2") in sae.source["imported"]["units"]


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_whitened_inputs_are_folded(
    architecture: str,
    subtracts: bool,
    written: Callable[..., Path],
    x: Tensor,
    assert_same: Callable[..., None],
) -> None:
    config = {
        "architecture": architecture,
        "normalize_activations": "covariance_whitening",
        "apply_b_dec_to_input": subtracts,
    }
    own = {"threshold": torch.rand(D_SAE)}
    if architecture == "gated":
        own = {n: torch.randn(D_SAE) for n in ("b_gate", "b_mag", "r_mag")} | {
            "b_enc": torch.empty(0)
        }
    folder = written(config, **own)
    matrix = torch.randn(D_IN, D_IN).double() + 3 * torch.eye(D_IN)
    white = {
        "mean": torch.randn(D_IN).double(),
        "matrix": matrix,
        "inverse_matrix": matrix.inverse().contiguous(),
    }
    save_file(white, folder / "activation_whitening.safetensors")
    w = {name: weight.double() for name, weight in weights_of(folder).items()}
    z = (x.double() - white["mean"]) @ matrix
    zc = z - w["b_dec"] if subtracts else z
    if architecture == "gated":
        gate, u = zc @ w["W_enc"] + w["b_gate"], zc @ w["W_enc"]
        f = (gate > 0) * (w["r_mag"].exp() * u + w["b_mag"]).relu()
    else:
        pre = zc @ w["W_enc"] + w["b_enc"]
        f = pre.relu() * (pre > w["threshold"])
    x_hat = (f @ w["W_dec"] + w["b_dec"]) @ white["inverse_matrix"] + white["mean"]
    sae = lightning_sae.load(folder)
    assert_same((sae.encode(x), sae(x)), (f.float(), x_hat.float()))


def test_a_missing_scale_warns(written: Callable[..., Path]) -> None:
    folder = written(
        {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    )
    with pytest.warns(UserWarning, match="theirs does not say all.* scale of the inputs is 1"):
        sae = lightning_sae.load(folder)
    assert len(sae.source["imported"]["guessed"]) == 1


def test_files_before_version_6_are_read(
    written: Callable[..., Path], x: Tensor, assert_same: Callable[..., None]
) -> None:
    config = {
        "metadata": None,
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "hook_point": "blocks.2.attn.hook_z",
        "model_name": "gpt2-small",
        "context_size": 128,
        "normalize_activations": "none",
        "finetuning_scaling_factor": True,
    }
    factor = torch.rand(D_SAE)
    folder = written(config, scaling_factor=factor)
    w = weights_of(folder)
    f = top_k((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 3)
    sae = lightning_sae.load(folder)
    assert isinstance(sae, lightning_sae.TopKSAE)
    assert_same((sae.encode(x), sae(x)), (f, (f * factor) @ w["W_dec"] + w["b_dec"]))
    assert sae.source["model"] == "gpt2-small"
    assert sae.source["hook_name"] == "blocks.2.attn.hook_z"
    assert sae.source["context_length"] == 128


def test_thresholds_kept_as_logarithms_are_read(written: Callable[..., Path], x: Tensor) -> None:
    theta = torch.rand(D_SAE)
    folder = written({"architecture": "jumprelu"}, log_threshold=theta.log())
    torch.testing.assert_close(lightning_sae.load(folder).threshold, theta)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "transcoder"}, "'transcoder'.* no transcoders"),
        ({"architecture": "abstopk", "k": 3}, "'abstopk'.*none with signed latents"),
        ({"activation_fn": "tanh-relu"}, "standard with 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "divided by its own norm, which decoding"),
        ({"normalize_activations": "constant"}, "`normalize_activations` is 'constant'"),
        ({"architecture": "topk", "k": 3.5}, "`k` is 3.5, and a row has a whole number"),
        ({"architecture": "topk"}, "`k` is None, not a positive number"),
        ({"d_sae": 2048}, r"`d_sae` is 2048 but the weights are 20 wide"),
        ({"apply_b_dec_to_input": "no"}, "neither true nor false"),
        ({"architecture": "jumprelu"}, r"lack \['threshold'\]"),
    ],
)
def test_what_no_sae_here_computes_is_refused(
    config: dict[str, Any], message: str, written: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=rf"^Could not read .*{message}"):
        lightning_sae.load(written(config))


def test_an_unknown_tensor_is_not_ignored(written: Callable[..., Path]) -> None:
    folder = written({"architecture": "standard"}, W_skip=torch.zeros(D_IN, D_IN))
    with pytest.raises(ValueError, match=r"\['W_skip'\] are unknown"):
        lightning_sae.load(folder)


# What is said in what is written.


def test_the_metadata_of_an_imported_sae_goes_back(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    metadata = {"neuronpedia_id": "gpt2-small/1-x", "prepend_bos": True, "model_name": "gpt2-small"}
    folder = written({"metadata": {**metadata, "sae_lens_version": "6.40.0", "l0": 12.5}})
    again = export(lightning_sae.load(folder), tmp_path / "again", "saelens")
    found = json.loads((again / "cfg.json").read_text())["metadata"]
    assert metadata.items() <= found.items()
    assert found["l0"] == 12.5


def test_heads_side_by_side_are_reshaped_there(sae_of: Callable[..., Any], tmp_path: Path) -> None:
    sae = sae_of("relu")
    sae.source |= {"hook_name": "blocks.0.attn.hook_z"}
    config = json.loads((export(sae, tmp_path / "all", "saelens") / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    sae.source |= {"head": 2}
    config = json.loads((export(sae, tmp_path / "one", "saelens") / "cfg.json").read_text())
    assert (config["reshape_activations"], config["metadata"]["hook_head_index"]) == ("none", 2)


@pytest.mark.parametrize("more", [0.0, 0.002, 0.006])  # the next number is 0.0078 away
@pytest.mark.parametrize("name", ["batch topk", "jumprelu"])
def test_thresholds_of_bfloat16_let_the_same_pre_activations_through(
    name: str, more: float, sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    sae = sae_of(name, scaled=False)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.copy_(1 + torch.arange(D_SAE) / 128)  # neighbours in bfloat16
        sae.threshold.fill_(1.0390625 + more)
    sae = sae.bfloat16()
    folder = export(sae, tmp_path / "out", "saelens")
    assert weights_of(folder)["threshold"].dtype == torch.bfloat16
    x = torch.zeros(1, D_IN)
    active = sae.encode(x) > 0
    assert 0 < active.sum() < D_SAE
    assert torch.equal(forward(folder, x)[0] > 0, active)
    back = lightning_sae.load(folder)
    assert back.W_dec.dtype == torch.bfloat16
    assert torch.equal(back.encode(x) > 0, active)
