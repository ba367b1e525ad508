"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and before.

The forward pass, with xc = x - b_dec if `apply_b_dec_to_input`, else x, and v = xc W_enc + b_enc:

- `standard`: f = ReLU(v)
- `jumprelu`: f = ReLU(v) [v > threshold]; `batchtopk` and `matryoshka_batchtopk` are finished as
  this, and their checkpoints in training have one `topk_threshold` for all
- `topk`: f = ReLU(TopK(v, k)); with `rescale_acts_by_decoder_norm` of v times the norms of decoder
  rows, which decoding divides by
- `gated`: f = [xc W_enc + b_gate > 0] ReLU(xc (W_enc exp(r_mag)) + b_mag)

and x_hat = f W_dec + b_dec. `normalize_activations` is `none` in finished files, into which a
constant scale of the inputs is folded with the latents left in scaled units; a checkpoint in
training has the scale beside it, in `activation_scaler.json`. Read from SAELens 6.54.12; before
version 6 `cfg.json` was flat.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sae.interop.found import (
    RAW,
    Found,
    flag,
    fold_norms,
    fold_scale,
    free_rows,
    from_on,
    number,
    own_source,
    own_units,
    part,
    require_sizes,
    whole,
    with_window,
)
from lightning_sae.interop.outgoing import Outgoing
from lightning_sae.interop.reading import pick, read_config, read_safetensors, refusal
from lightning_sae.interop.writing import as_json, as_safetensors, origin, write_files

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
FILES = f"{CONFIG} and {WEIGHTS}"
VERSION = "6.54.12"
"""The version whose layout is written."""

SHARED = {"W_enc": 2, "W_dec": 2, "b_dec": 1}
NEEDED = {
    "standard": {**SHARED, "b_enc": 1},
    "jumprelu": {**SHARED, "b_enc": 1, "threshold": 1},
    "topk": {**SHARED, "b_enc": 1},
    "batchtopk": {**SHARED, "b_enc": 1, "topk_threshold": 0},
    "matryoshka_batchtopk": {**SHARED, "b_enc": 1, "topk_threshold": 0},
    "gated": {**SHARED, "b_gate": 1, "b_mag": 1, "r_mag": 1},
}
"""Tensors of each architecture, and their number of axes."""
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
OF_THE_MODEL = {
    "model_name": "model",
    "hook_name": "hook_name",
    "hook_head_index": "head",
    "context_size": "context_length",
    "dataset_path": "text",
}
"""SAELens' names for the entries of `source`, and ours."""


def recognises(path: Path) -> bool:
    """Whether a folder is in this format."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


# Reading.


def read(path: Path, _wanted: str | None = None) -> Found:
    """The SAE in a folder.

    Raises:
        ValueError: If it is damaged, or computes what no SAE of this package does.
    """
    of = path / CONFIG
    config = {OLD_NAMES.get(name, name): value for name, value in read_config(of).items()}
    metadata = {**config, **part(config, "metadata", of)}  # one dictionary before 6
    guessed: list[str] = []
    architecture = _architecture(config, of)
    if config.get("normalize_activations") in ("layer_norm", "constant_norm_rescale"):
        raise refusal(of, "each activation is divided by its own norm, which decoding cannot undo")
    weights = _weights(architecture, path / WEIGHTS)
    require_sizes(of, weights, d_sae=config.get("d_sae"), d_in=config.get("d_in"))
    weights, units = _finished(config, weights, path, guessed)
    return Found(
        architecture=CLASSES[architecture],
        arguments={
            **_arguments(architecture, config, of, len(weights["W_dec"])),
            "apply_b_dec_to_input": _subtracts(config, of),
            "decoder_norm": free_rows(weights["W_dec"]),
        },
        weights=weights,
        source={**own_source(metadata), **_source(metadata)},
        units=own_units(metadata) or units,
        guessed=guessed,
        rest={"metadata": {name: value for name, value in metadata.items() if name in KEPT}},
    )


def _architecture(config: dict[str, Any], of: Path) -> str:
    found = str(config.get("architecture", "standard"))
    activation = config.get("activation_fn", "relu")
    if found == "standard" and activation == "topk":  # before it was a separate architecture
        found = "topk"
    if found not in CLASSES or (found == "standard" and activation != "relu"):
        what = repr(found) if found not in CLASSES else f"{found} with {activation!r}"
        raise refusal(
            of,
            f"it is of architecture {what:.60}, and this package has SAEs for "
            f"{', '.join(CLASSES)}, no transcoders and none with signed latents",
        )
    return found


CLASSES = {
    "standard": "ReLUSAE",
    "jumprelu": "JumpReLUSAE",
    "topk": "TopKSAE",
    "batchtopk": "BatchTopKSAE",
    "matryoshka_batchtopk": "MatryoshkaSAE",
    "gated": "GatedSAE",
}


def _weights(architecture: str, of: Path) -> dict[str, Tensor]:
    """Weights by this package's names; further weights of earlier versions are folded in."""
    tensors = read_safetensors(of)
    if "log_threshold" in tensors and "threshold" not in tensors:  # in training, before 6.48
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    weights = pick(tensors, of, NEEDED[architecture], {"scaling_factor": 1})
    if "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    factor = weights.pop("scaling_factor", None)  # latents were times it before decoding
    if factor is not None:
        if factor.shape != weights["W_dec"].shape[:1]:
            raise refusal(of, f"scaling_factor has shape {tuple(factor.shape)}")
        weights["W_dec"] = weights["W_dec"] * factor.unsqueeze(-1)
    return weights


def _arguments(architecture: str, config: dict[str, Any], of: Path, d_sae: int) -> dict[str, Any]:
    if architecture == "topk":
        old = part(config, "activation_fn_kwargs", of)
        return {"k": whole(config if config.get("k") is not None else old, "k", of)}
    if "batchtopk" not in architecture:
        return {}
    found: dict[str, Any] = {"k": number(config, "k", of)}
    if architecture == "matryoshka_batchtopk":
        widths = config.get("matryoshka_widths")
        if not isinstance(widths, list) or not all(type(width) is int for width in widths):
            raise refusal(of, f"its `matryoshka_widths` are {widths!r:.40}")
        found["prefixes"] = [*(width for width in widths if width != d_sae), d_sae]
    return found


def _finished(
    config: dict[str, Any], weights: dict[str, Tensor], path: Path, guessed: list[str]
) -> tuple[dict[str, Tensor], str]:
    """Fold as SAELens does at the end of a run: the scale, then norms, then whitening."""
    of = path / CONFIG
    how = config.get("normalize_activations")
    units = f"{RAW}; if SAELens scaled the inputs in training, they are in its scaled units"
    rescaled = flag(config, "rescale_acts_by_decoder_norm", of, default=False)
    if how in (True, "expected_average_only_in"):
        scale = _scale(path, guessed)
        weights, units = fold_scale(weights, scale), f"SAELens' own, of inputs times {scale:g}"
        if rescaled:  # norms are smaller by the scale now, and so is all that they multiply
            units = "raw: inputs are not scaled, as in what SAELens makes of this checkpoint"
            weights |= {n: w / scale for n, w in weights.items() if n == "topk_threshold"}
    if rescaled:
        weights = fold_norms(weights)
        units += "; latents are times the norms of their decoder rows, now of norm 1"
    if how == "covariance_whitening":
        weights, units = _whitened(config, weights, path), "SAELens' own, of whitened inputs"
    elif how not in (None, True, False, "none", "expected_average_only_in"):
        raise refusal(of, f"its `normalize_activations` is {how!r:.40}, which is not known")
    if "threshold" in weights:
        weights = with_window(weights)
    if "topk_threshold" in weights:
        weights["threshold"] = from_on(weights["topk_threshold"].clamp(min=0.0), weights)
        del weights["topk_threshold"]
    return weights, units


def _scale(path: Path, guessed: list[str]) -> float:
    """The factor of the inputs before the SAE."""
    if (path / SCALER).is_file():
        return number(read_config(path / SCALER), "scaling_factor", path / SCALER)
    guessed.append(
        "that the scale of the inputs is 1: it says that they were scaled but not by how much; "
        "compare its L0 and its reconstruction with what is known of it"
    )
    return 1.0


def _whitened(config: dict[str, Any], weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Fold z = (x - mean) M into the encoder, and its inverse into the decoder."""
    if not (path / WHITENING).is_file():
        raise refusal(path / CONFIG, f"its inputs are whitened, and {WHITENING} is missing")
    needed = {"mean": 1, "matrix": 2, "inverse_matrix": 2}
    white = pick(read_safetensors(path / WHITENING), path / WHITENING, needed)
    d_in, dtype = weights["W_dec"].shape[1], weights["W_dec"].dtype
    if any(set(tensor.shape) != {d_in} for tensor in white.values()):
        raise refusal(path / WHITENING, f"it is not {d_in} wide")
    mean, matrix, inverse = (white[name].double() for name in needed)
    W_enc = matrix @ weights["W_enc"].double()
    changed = {
        "W_enc": W_enc,
        "W_dec": weights["W_dec"].double() @ inverse,
        "b_dec": weights["b_dec"].double() @ inverse + mean,
    }
    if not _subtracts(config, path / CONFIG):
        shift = mean @ W_enc
        changed["b_enc"] = weights["b_enc"].double() - shift
        if "b_mag" in weights:
            changed["b_mag"] = weights["b_mag"].double() - weights["r_mag"].double().exp() * shift
    return {**weights, **{name: weight.to(dtype) for name, weight in changed.items()}}


def _source(metadata: dict[str, Any]) -> dict[str, Any]:
    found = {ours: metadata.get(theirs) for theirs, ours in OF_THE_MODEL.items()}
    kinds = {"model": str, "hook_name": str, "head": int, "context_length": int, "text": str}
    return {name: value for name, value in found.items() if isinstance(value, kinds[name])}


def _subtracts(config: dict[str, Any], of: Path) -> bool:
    return flag(config, "apply_b_dec_to_input", of, default=True)


KEPT = (
    "model_class_name", "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens",
    "sequence_separator_token", "disable_concat_sequences", "seqpos_slice", "neuronpedia_id",
    "hf_hook_name", "sae_lens_version", "sae_lens_training_version", "l0", "num_dead_features",
)  # fmt: skip
"""Metadata that is kept for export."""


# Writing.


def write(sae: Outgoing, folder: Path) -> None:
    """Write an SAE in the format of SAELens' `SAE.load_from_disk`."""
    weights = dict(sae.weights)
    if sae.form == "gated":
        weights["b_gate"] = weights.pop("b_enc")
    config = {
        "architecture": ARCHITECTURES[sae.form],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": sae.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtracts,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if _reads_heads(sae) else "none",
        "metadata": _metadata(sae),
    }
    if sae.form == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_files(folder, {CONFIG: as_json(config), WEIGHTS: as_safetensors(weights)})


ARCHITECTURES = {"relu": "standard", "threshold": "jumprelu", "topk": "topk", "gated": "gated"}


def _reads_heads(sae: Outgoing) -> bool:
    """Whether SAELens must concatenate the heads of an activation."""
    hook = sae.source.get("hook_name")
    return isinstance(hook, str) and hook.endswith("hook_z") and sae.source.get("head") is None


def _metadata(sae: Outgoing) -> dict[str, Any]:
    imported = sae.source.get("imported")
    kept = imported.get("metadata", {}) if isinstance(imported, dict) else {}
    own = {theirs: sae.source.get(ours) for theirs, ours in OF_THE_MODEL.items()}
    start = str(sae.source.get("document_start", ""))
    if start:
        own["prepend_bos"] = start.startswith(("bos", "auto (bos"))
    return {
        **kept,
        **{name: value for name, value in own.items() if value is not None},
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "lightning_sae": origin(sae),
    }
