r"""Llama Scope (OpenMOSS), of three layouts.

- The first: `hyperparams.json` and `checkpoints/final.safetensors`, of `encoder` and `decoder`.
  Its library divides biases by the scale of the inputs, makes decoder rows unit where
  `sparsity_include_decoder_norm`, and then keeps pre-activations above `jump_relu_threshold`, one
  for all latents: in raw units.
- R1-Distill: `config.json` and `sae_weights.safetensors`, of `encoder`, `decoder` and
  `log_jumprelu_threshold`.
- Llamascopium: the same two files, of W_E [d_in, d_sae], b_E, W_D [d_sae, d_in], b_D,
  `activation_function.log_jumprelu_threshold` and `dataset_average_activation_norm.<hook>`.

Of the last two, with s = sqrt(d_in) / average norm if `norm_activation` is `dataset-wise`, else 1:
v = s x W_E + b_E, x_hat = (f W_D + b_D) / s, and f = ReLU(v), or v [v > threshold], or
ReLU(TopK(v, `top_k`)), which look at v times the norms of decoder rows where
`sparsity_include_decoder_norm`. Read from Language-Model-SAEs, of 2024 and of 2026.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sae.interop.found import (
    RAW,
    Found,
    flag,
    fold_norms,
    fold_scale,
    free_rows,
    number,
    own_source,
    own_units,
    part,
    require_sizes,
    text,
    transposed,
    whole,
    with_window,
)
from lightning_sae.interop.outgoing import Outgoing
from lightning_sae.interop.reading import pick, read_config, read_safetensors, refusal
from lightning_sae.interop.writing import as_json, as_safetensors, origin, refuse, write_files

NAME = "llama_scope"
OLD_CONFIG, OLD_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
FILES = f"{OLD_CONFIG} and {OLD_WEIGHTS}, or {CONFIG} and {WEIGHTS}"

NAMES = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
LINEAR = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2, "decoder.bias": 1}
NORM, LOGARITHM = "dataset_average_activation_norm", "log_jumprelu_threshold"


def recognises(path: Path) -> bool:
    """Whether a folder is in this format."""
    old = (path / OLD_CONFIG).is_file() and (path / OLD_WEIGHTS).is_file()
    return old or ((path / CONFIG).is_file() and (path / WEIGHTS).is_file())


def read(path: Path, _wanted: str | None = None) -> Found:
    """The SAE in a folder.

    Raises:
        ValueError: If it is damaged, or computes what no SAE of this package does.
    """
    old = (path / OLD_CONFIG).is_file()
    of = path / (OLD_CONFIG if old else CONFIG)
    config = read_config(of)
    _require_sae(config, of)
    file = path / (OLD_WEIGHTS if old else WEIGHTS)
    tensors = read_safetensors(file)
    norms = {n: tensors.pop(n) for n in [*tensors] if n.startswith(f"{NORM}.")}
    weights = _by_our_names(tensors, config, file)
    require_sizes(of, weights, d_in__d_model=config.get("d_model"))
    require_sizes(of, weights, d_sae=_d_sae(config, of))
    scale = _scale(config, norms, len(weights["b_dec"]), of)
    guessed: list[str] = []
    finish = _old if old else _new
    architecture, arguments, weights, units = finish(config, weights, scale, of)
    return Found(
        architecture=architecture,
        arguments={
            **arguments,
            "apply_b_dec_to_input": _subtracts(config, of),
            "decoder_norm": free_rows(weights["W_dec"]),
        },
        weights=weights,
        source=own_source(config) or {"hook_name": text(config.get("hook_point_in"))},
        units=own_units(config) or units,
        guessed=guessed,
        rest={},
    )


def _require_sae(config: dict[str, Any], of: Path) -> None:
    kind = config.get("sae_type", "sae")
    if kind != "sae":
        raise refusal(of, f"its `sae_type` is {kind!r:.40}, and only `sae` is known here")
    ends = config.get("hook_point_in"), config.get("hook_point_out")
    if None not in ends and ends[0] != ends[1]:
        raise refusal(of, "it is a transcoder, which predicts another activation than it reads")
    if flag(config, "use_glu_encoder", of, default=False):
        raise refusal(of, "its encoder is a gated linear unit, which no SAE of this package has")


def _subtracts(config: dict[str, Any], of: Path) -> bool:
    return flag(config, "apply_decoder_bias_to_pre_encoder", of, default=False)


def _d_sae(config: dict[str, Any], of: Path) -> int | None:
    if config.get("d_sae") is not None or config.get("expansion_factor") is None:
        return config.get("d_sae")
    return int(number(config, "d_model", of) * number(config, "expansion_factor", of))


def _by_our_names(
    tensors: dict[str, Tensor], config: dict[str, Any], of: Path
) -> dict[str, Tensor]:
    tensors = {name.removeprefix("activation_function."): w for name, w in tensors.items()}
    linear = "encoder.weight" in tensors
    needed = LINEAR if linear else {"W_E": 2, "b_E": 1, "W_D": 2, "b_D": 1}
    if not flag(config, "use_decoder_bias", of, default=True):
        needed = {
            name: axes for name, axes in needed.items() if name not in ("b_D", "decoder.bias")
        }
    found = pick(tensors, of, needed, {LOGARITHM: 1})
    if linear:
        for short, long in (("E", "encoder"), ("D", "decoder")):
            found[f"W_{short}"] = transposed(found.pop(f"{long}.weight"))
            found |= {f"b_{short}": found.pop(name) for name in [f"{long}.bias"] if name in found}
    weights = {NAMES.get(name, name): weight for name, weight in found.items()}
    weights.setdefault("b_dec", weights["W_dec"].new_zeros(weights["W_dec"].shape[1]))
    return weights


def _scale(config: dict[str, Any], norms: dict[str, Tensor], d_in: int, of: Path) -> float:
    """The factor of the inputs."""
    how = config.get("norm_activation", "dataset-wise" if norms or NORM in config else "inference")
    if how in ("inference", None):
        return 1.0
    if how != "dataset-wise":
        reason = "which decoding cannot undo"
        raise refusal(of, f"its `norm_activation` is {how!r:.40}: a scale of each batch, {reason}")
    known = {name.removeprefix(f"{NORM}."): norm for name, norm in norms.items()}
    known |= part(config, NORM, of)
    values = [known[name] for name in ("in", text(config.get("hook_point_in"))) if name in known]
    plain = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in values]
    return math.sqrt(d_in) / number({NORM: plain[0] if plain else None}, NORM, of)


Finished = tuple[str, dict[str, Any], dict[str, Tensor], str]


def _old(config: dict[str, Any], weights: dict[str, Tensor], scale: float, of: Path) -> Finished:
    """Convert to raw units, as the library does when it loads."""
    if LOGARITHM in weights:
        raise refusal(of, f"it has a `{LOGARITHM}` that this layout does not know")
    divided = {name: weights[name] / scale for name in ("b_enc", "b_dec")}
    weights = {**weights, **divided}
    units = "raw: the scale of the inputs is folded into biases, as its own library does"
    if flag(config, "sparsity_include_decoder_norm", of, default=True):
        weights = fold_norms(weights)
        units += "; decoder rows are of norm 1, and latents times the norms that they had"
    activation = config.get("act_fn", "relu")
    if activation == "relu":
        return "ReLUSAE", {}, weights, units
    if activation not in ("topk", "jumprelu"):
        raise refusal(of, f"its `act_fn` is {activation!r:.40}")
    if activation == "topk" and not config.get("jump_relu_threshold"):
        return "TopKSAE", {"k": whole(config, "top_k", of)}, weights, units
    threshold = number(config, "jump_relu_threshold", of)
    weights["threshold"] = torch.full((len(weights["b_enc"]),), threshold)
    return "JumpReLUSAE", {}, with_window(weights), units


def _new(config: dict[str, Any], weights: dict[str, Tensor], scale: float, of: Path) -> Finished:
    """Keep the units of the library, which scales the inputs before the SAE."""
    activation = str(config.get("act_fn", "jumprelu" if LOGARITHM in weights else "relu"))
    looks_at_norms = flag(config, "sparsity_include_decoder_norm", of, default=True)
    units = RAW if scale == 1.0 else f"its library's: inputs times {scale:g}, within the weights"
    logarithm = weights.pop(LOGARITHM, None)
    if activation == "jumprelu" and logarithm is not None:
        norms = weights["W_dec"].float().norm(dim=-1) if looks_at_norms else torch.ones(())
        threshold = logarithm.float().exp() / norms  # any norm does for a row of zeros
        weights["threshold"] = threshold.clamp(max=torch.finfo(torch.float32).max)
        return "JumpReLUSAE", {}, with_window(fold_scale(weights, scale)), units
    if activation == "relu" and logarithm is None:
        return "ReLUSAE", {}, fold_scale(weights, scale), units
    if activation == "topk" and logarithm is None:
        if looks_at_norms:  # before the scale, which changes them
            units += "; latents are times the norms of decoder rows, now of norm 1 before scaling"
            weights = fold_norms(weights)
        return "TopKSAE", {"k": whole(config, "top_k", of)}, fold_scale(weights, scale), units
    if activation == "batchtopk":
        remedy = "convert it to jumprelu there"
        raise refusal(of, f"its latents depend on the batch, because it has no threshold: {remedy}")
    raise refusal(of, f"its `act_fn` is {activation!r:.40}, with thresholds or without")


def write(sae: Outgoing, folder: Path) -> None:
    """Write an SAE in the format of llamascopium's `SparseAutoEncoder.from_pretrained`."""
    if sae.form == "gated":
        reason = "there, a latent has one bias and one threshold"
        raise refuse(sae, NAME, reason, "`saelens` or `dictionary_learning`")
    sae = sae.subtracting(False)
    weights = {theirs: sae.weights[ours] for theirs, ours in NAMES.items()}
    if sae.form == "threshold":
        weights[f"activation_function.{LOGARITHM}"] = sae.weights["threshold"].log()
    hook = sae.source.get("hook_name")
    one = torch.ones((), dtype=weights["W_E"].dtype)
    config = {
        "sae_type": "sae",
        "d_model": sae.d_in,
        "expansion_factor": _factor(sae.d_sae, sae.d_in),
        "use_decoder_bias": True,
        "act_fn": {"relu": "relu", "threshold": "jumprelu", "topk": "topk"}[sae.form],
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        **({"top_k": int(sae.k)} if sae.form == "topk" and sae.k is not None else {}),
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_glu_encoder": False,
        "dtype": f"torch.{sae.dtype}",
        "device": "cpu",
        "lightning_sae": origin(sae),
    }
    weights |= {f"{NORM}.{hook}": one} if isinstance(hook, str) else {}
    write_files(folder, {CONFIG: as_json(config), WEIGHTS: as_safetensors(weights)})


def _factor(d_sae: int, d_in: int) -> float:
    """A factor from which the library recovers `d_sae` by truncation."""
    factor = d_sae / d_in
    return factor if int(d_in * factor) == d_sae else math.nextafter(factor, math.inf)
