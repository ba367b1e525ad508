"""Gemma Scope: `params.npz`; Gemma Scope 2: `params.safetensors`, with `config.json`.

The forward pass: v = x W_enc + b_enc, f = ReLU(v) [v > threshold], x_hat = f W_dec + b_dec, in
float32 and of raw activations. The first names model and hook only in its folders,
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`. Layouts: the published files, as SAELens
6.54.12 reads them.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sae.interop.found import (
    RAW,
    Found,
    free_rows,
    own_source,
    own_units,
    require_sizes,
    text,
    with_window,
)
from lightning_sae.interop.outgoing import Outgoing
from lightning_sae.interop.reading import pick, read_config, read_npz, read_safetensors, refusal
from lightning_sae.interop.writing import as_json, origin, refuse, write_files

NAME = "gemma_scope"
ARCHIVE, TENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
FILES = f"{ARCHIVE} or {TENSORS}, or such a .npz file"
NEEDED = {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1, "threshold": 1}
SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
HUGGING_FACE = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Sites in a layer, as named in Gemma Scope 2."""


def recognises(path: Path) -> bool:
    """Whether a folder or file is in this format."""
    in_folder = (path / ARCHIVE).is_file() or (path / TENSORS).is_file()
    return in_folder or (path.suffix == ".npz" and path.is_file())


def read(path: Path, _wanted: str | None = None) -> Found:
    """The SAE in a folder or file.

    Raises:
        ValueError: If it is damaged or a transcoder.
    """
    file = _file(path)
    tensors = read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
    named = {re.sub("^w_", "W_", name): tensor for name, tensor in tensors.items()}
    weights = with_window(pick(named, file, NEEDED))
    of = file.with_name(CONFIG)
    config = read_config(of) if of.is_file() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise refusal(of, f"its `architecture` is {config['architecture']!r:.40}, not jump_relu")
    require_sizes(of, weights, d_sae__width=config.get("width"))
    guessed: list[str] = []
    return Found(
        architecture="JumpReLUSAE",
        arguments={"apply_b_dec_to_input": False, "decoder_norm": free_rows(weights["W_dec"])},
        weights=weights,
        source=own_source(config) or _source(config, file.absolute(), guessed),
        units=own_units(config) or RAW,
        guessed=guessed,
        rest={"l0": config.get("l0")} if isinstance(config.get("l0"), int | float) else {},
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    return path / (ARCHIVE if (path / ARCHIVE).is_file() else TENSORS)


def _source(config: dict[str, Any], file: Path, guessed: list[str]) -> dict[str, Any]:
    names = file.as_posix()
    goes_in, comes_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    elsewhere = goes_in is not None and comes_out not in (None, goes_in)
    if "transcoder" in names or "/clt" in names or elsewhere:
        raise refusal(file, "it is a transcoder, which predicts another activation than it reads")
    if goes_in is not None:
        return {"model": text(config.get("model_name")), "hook_name": _hook(text(goes_in))}
    model = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", names)
    layer = re.search(r"layer_(\d+)", names)
    if model is None or layer is None:
        guessed.append("as of no model and hook, for its files say none and nor do its folders")
        return {}
    guessed.append("to be of the model and hook that its folders are named after")
    instructed = "-it" if model[2] == "it" else ""
    return {
        "model": f"google/gemma-2-{model[1]}{instructed}",
        "hook_name": f"blocks.{int(layer[1])}.{SITES[model[3]]}",
    }


def _hook(place: str | None) -> str | None:
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", place or "")
    if match is None or match[2] not in HUGGING_FACE:
        return None
    return f"blocks.{int(match[1])}.{HUGGING_FACE[match[2]]}"


def write(sae: Outgoing, folder: Path) -> None:
    """Write an SAE in the layout of Gemma Scope, in float32, with a description beside it."""
    if sae.form not in ("relu", "threshold"):
        reason = "there, latents are pre-activations above a threshold"
        raise refuse(sae, NAME, reason, "`saelens` or `dictionary_learning`")
    sae = sae.subtracting(False)
    arrays = {name: weight.float().numpy() for name, weight in sae.weights.items()}
    arrays.setdefault("threshold", np.zeros(sae.d_sae, dtype=np.float32))
    config = {
        "architecture": "jump_relu",
        "width": sae.d_sae,
        "model_name": sae.source.get("model"),
        "lightning_sae": origin(sae),
    }
    write_files(folder, {ARCHIVE: lambda path: _save(path, arrays), CONFIG: as_json(config)})


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:  # a name would get a suffix
        np.savez(file, **arrays)
