"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors`, in a folder named after its hookpoint.

The forward pass, with W the weight of `encoder` [d_sae, d_in] and W_dec [d_sae, d_in]:
f = TopK(ReLU(W (x - b_dec) + encoder.bias), k), x_hat = f W_dec + b_dec. `num_latents` of 0 stands
for `d_in` times `expansion_factor`; `normalize_decoder` only affects training. The folder above
has the `config.json` of the run. Read from eai-sparsify 1.3.3.
"""

import re
from pathlib import Path
from typing import Any

from lightning_sae.interop.found import (
    RAW,
    Found,
    flag,
    free_rows,
    own_source,
    own_units,
    require_sizes,
    text,
    transposed,
    whole,
)
from lightning_sae.interop.outgoing import Outgoing
from lightning_sae.interop.reading import pick, read_config, read_safetensors, refusal
from lightning_sae.interop.writing import as_json, as_safetensors, origin, refuse, write_files

NAME = "sparsify"
CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
FILES = f"{CONFIG} and {WEIGHTS}"
NEEDED = {"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1}
OTHERS = {
    "transcode": "it predicts the output of a module from its input",
    "skip_connection": "it has a linear path around the latents",
    "signed": "its latents may be negative",
}
"""Flags of functions that no SAE of this package computes."""


def recognises(path: Path) -> bool:
    """Whether a folder is in this format."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, _wanted: str | None = None) -> Found:
    """The SAE in a folder.

    Raises:
        ValueError: If it is damaged, a transcoder, or has another activation.
    """
    of = path / CONFIG
    config = read_config(of)
    for name, reason in OTHERS.items():
        if flag(config, name, of, default=False):
            raise refusal(of, f"its `{name}` is true: {reason}, which no SAE of this package does")
    activation = config.get("activation", "topk")
    if activation != "topk":
        reason = "and of the SAEs here none has the largest latent of each group"
        raise refusal(of, f"its `activation` is {activation!r:.40}, {reason}")
    found = pick(read_safetensors(path / WEIGHTS), path / WEIGHTS, NEEDED)
    weights = {
        "W_enc": transposed(found["encoder.weight"]),
        "b_enc": found["encoder.bias"],
        "W_dec": found["W_dec"],
        "b_dec": found["b_dec"],
    }
    latents = config.get("num_latents") or None
    require_sizes(of, weights, d_in=config.get("d_in"), d_sae__num_latents=latents)
    guessed: list[str] = []
    return Found(
        architecture="TopKSAE",
        arguments={
            "k": whole(config, "k", of),
            "apply_b_dec_to_input": True,
            "decoder_norm": free_rows(weights["W_dec"]),
        },
        weights=weights,
        source=own_source(config) or _source(path.absolute(), guessed),
        units=own_units(config) or RAW,
        guessed=guessed,
        rest={"hookpoint": path.absolute().name},
    )


def _source(path: Path, guessed: list[str]) -> dict[str, Any]:
    run = path.parent / RUN
    config = read_config(run) if run.is_file() else {}
    context = config.get("ctx_len")
    hook = hook_of(path.name)
    if hook is None:
        guessed.append(f"at no hook in particular, for its folder's name, {path.name}, says none")
    return {
        "model": text(config.get("model")),
        "text": text(config.get("dataset")),
        "context_length": context if isinstance(context, int) else None,
        "hook_name": hook,
    }


OUTPUTS = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "attention": "hook_attn_out",
    "self_attn": "hook_attn_out",
}


def hook_of(hookpoint: str) -> str | None:
    """TransformerLens' name of a module's output; None if it has none.

    Example:
        >>> hook_of("layers.5"), hook_of("gpt_neox.layers.5.mlp"), hook_of("embed_tokens")
        ('blocks.5.hook_resid_post', 'blocks.5.hook_mlp_out', 'hook_embed')
    """
    if hookpoint.endswith("embed_tokens"):
        return "hook_embed"
    match = re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h)\.(\d{1,4})(?:\.(\w+))?", hookpoint)
    if match is None or (match[2] or "") not in OUTPUTS:
        return None
    return f"blocks.{int(match[1])}.{OUTPUTS[match[2] or '']}"


def write(sae: Outgoing, folder: Path) -> None:
    """Write an SAE in the format of sparsify's `SparseCoder.load_from_disk`."""
    if sae.form != "topk":
        reason = "there, latents are the k largest of each row"
        raise refuse(sae, NAME, reason, "`saelens` or `dictionary_learning`")
    sae = sae.subtracting(True)
    assert sae.k is not None
    weights = {
        "encoder.weight": transposed(sae.weights["W_enc"]),
        "encoder.bias": sae.weights["b_enc"],
        "W_dec": sae.weights["W_dec"],
        "b_dec": sae.weights["b_dec"],
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": free_rows(sae.weights["W_dec"]) == "unit",
        "num_latents": sae.d_sae,
        "k": int(sae.k),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "lightning_sae": origin(sae),
    }
    write_files(folder, {CONFIG: as_json(config), WEIGHTS: as_safetensors(weights)})
