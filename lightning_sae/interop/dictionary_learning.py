"""dictionary_learning: `ae.pt`, a dictionary of tensors, and `config.json`.

The forward pass of each `dict_class`, with W and D the weights of `encoder` [d_sae, d_in] and
`decoder` [d_in, d_sae]:

- `AutoEncoder`: f = ReLU(W (x - bias) + b), x_hat = D f + bias
- `AutoEncoderNew`: f = ReLU(W x + b), x_hat = D f + decoder.bias
- `GatedAutoEncoder`: u = W (x - decoder_bias), f = [u + gate_bias > 0] ReLU(e^r_mag u + mag_bias),
  x_hat = D f + decoder_bias
- `AutoEncoderTopK`: f = TopK(ReLU(W (x - b_dec) + b), k), x_hat = D f + b_dec
- `BatchTopKSAE`, `MatryoshkaBatchTopKSAE`: f = v [v > threshold] with v the ReLU above; a threshold
  of -1 was never set, and lets all through
- `JumpReluAutoEncoder`: v = x W_enc + b_enc, f = ReLU(v [v > threshold]), x_hat = f W_dec + b_dec

Read from dictionary-learning 0.1.0, where inputs may be scaled in training and biases and
thresholds are scaled back before they are saved: latents are in raw units. Only the backup of a run
is saved in scaled units, with its `norm_factor`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sae.interop.found import (
    RAW,
    Found,
    free_rows,
    from_on,
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
from lightning_sae.interop.reading import names_in_pt, pick, read_config, read_pt, refusal
from lightning_sae.interop.writing import as_json, origin, refuse, write_files

NAME = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
FILES = f"{WEIGHTS}, with {CONFIG} beside it, or such a .pt file"

LINEAR = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2}
PLAIN = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
NEEDED = {
    "AutoEncoder": {**LINEAR, "bias": 1},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": 1},
    "GatedAutoEncoder": {
        "encoder.weight": 2, "decoder.weight": 2, "decoder_bias": 1,
        "r_mag": 1, "gate_bias": 1, "mag_bias": 1,
    },
    "AutoEncoderTopK": {**LINEAR, "b_dec": 1},
    "BatchTopKSAE": {**LINEAR, "b_dec": 1, "threshold": 0},
    "MatryoshkaBatchTopKSAE": {**PLAIN, "threshold": 0},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": 1},
}  # fmt: skip
"""Tensors of each `dict_class`, and their number of axes."""
CLASSES = {
    "AutoEncoder": "ReLUSAE",
    "AutoEncoderNew": "ReLUSAE",
    "GatedAutoEncoder": "GatedSAE",
    "AutoEncoderTopK": "TopKSAE",
    "BatchTopKSAE": "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE": "MatryoshkaSAE",
    "JumpReluAutoEncoder": "JumpReLUSAE",
}
IGNORED = {"AutoEncoderTopK": ("k", "threshold"), "BatchTopKSAE": ("k",)}
IGNORED["MatryoshkaBatchTopKSAE"] = ("k", "group_sizes")
RENAMED = {
    "encoder.bias": "b_enc", "gate_bias": "b_enc", "mag_bias": "b_mag", "bias": "b_dec",
    "decoder.bias": "b_dec", "decoder_bias": "b_dec",
}  # fmt: skip
SCALED = ("b_enc", "b_mag", "b_dec", "threshold")
NO_CENTRING = ("AutoEncoderNew", "JumpReluAutoEncoder")


def recognises(path: Path) -> bool:
    """Whether a folder or file is in this format."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    names = names_in_pt(path)
    return "ae" in names or any(needed.keys() <= names for needed in NEEDED.values())


# Reading.


def read(path: Path, wanted: str | None = None) -> Found:
    """The SAE in a folder or file.

    Args:
        path: A folder, or a file such as `checkpoints/ae_1000.pt`.
        wanted: The requested class, for files without a description that could be either.

    Raises:
        ValueError: If it is damaged, or not a dictionary.
    """
    file = path / WEIGHTS if path.is_dir() else path
    description = file.with_name(CONFIG)
    config = read_config(description) if description.is_file() else {}
    return of_tensors(read_pt(file), config, file, wanted)


def of_tensors(content: Any, config: dict[str, Any], file: Path, wanted: str | None) -> Found:
    """The same, from loaded content."""
    if not isinstance(content, dict):
        raise refusal(file, f"it holds a {type(content).__name__}, not tensors by name")
    of, factor = file.with_name(CONFIG), 1.0
    guessed: list[str] = []
    trainer = part(config, "trainer", of)
    if "ae" in content:  # the backup of a run, for scaled inputs if it has a factor
        factor = number({**content, **_no_factor(content)}, "norm_factor", file)
        trainer = {**part(content, "config", file), **trainer}
        content = part(content, "ae", file)
    kind = _kind(trainer, content, file, wanted, guessed)
    tensors = pick(content, file, NEEDED[kind], ignored=IGNORED.get(kind, ()))
    weights = _renamed(tensors)
    require_sizes(
        of,
        weights,
        d_in__activation_dim=trainer.get("activation_dim"),
        d_sae__dict_size=trainer.get("dict_size"),
    )
    if factor != 1.0:
        weights |= {n: _scaled_back(weights[n], factor) for n in SCALED if n in weights}
    arguments = _arguments(kind, content, trainer, file)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        weights["threshold"] = _from_on(weights, guessed)
    elif kind == "JumpReluAutoEncoder":
        weights = with_window(weights)
    return Found(
        architecture=CLASSES[kind],
        arguments={
            **arguments,
            "apply_b_dec_to_input": kind not in NO_CENTRING,
            "decoder_norm": free_rows(weights["W_dec"]),
        },
        weights=weights,
        source={**own_source(config), **_source(trainer, part(config, "buffer", of), guessed)},
        units=own_units(config) or _units(kind, weights),
        guessed=guessed,
        rest={"dict_class": kind},
    )


def _units(kind: str, weights: dict[str, Tensor]) -> str:
    if kind == "AutoEncoder" and free_rows(weights["W_dec"]) == "free":
        return f"{RAW}; those of its `load_dictionary` are times the norms of decoder rows"
    return RAW


def _no_factor(content: dict[str, Any]) -> dict[str, float]:
    return {"norm_factor": 1.0} if content.get("norm_factor") is None else {}


def _scaled_back(values: Tensor, factor: float) -> Tensor:
    """Biases, or a threshold; negative means no threshold."""
    return values * factor if values.dim() or values >= 0 else values


def _kind(
    trainer: dict[str, Any],
    tensors: Mapping[str, Any],
    file: Path,
    wanted: str | None,
    guessed: list[str],
) -> str:
    """The `dict_class`, from the description or else from the tensors' names."""
    named = text(trainer.get("dict_class"))
    if named is not None and named in NEEDED:
        return named
    if named is not None:
        raise refusal(file, f"its `dict_class` is {named!r:.40}, and {', '.join(NEEDED)} are known")
    names = {str(name) for name in tensors}
    fitting = [
        kind
        for kind, needed in NEEDED.items()
        if needed.keys() <= names
        and names - needed.keys() <= {*IGNORED.get(kind, ())}
        and all(_has_axes(tensors[name], axes) for name, axes in needed.items())
    ]
    chosen = [kind for kind in fitting if CLASSES[kind] == wanted] or fitting
    if not chosen:
        raise refusal(file, f"no `dict_class` has the tensors {sorted(names)[:8]}")
    if len(chosen) > 1:
        guessed.append(
            f"that it is an {chosen[0]}: without {CONFIG} it could be a {chosen[1]}; say which by "
            f"`architecture={CLASSES[chosen[1]]}`"
        )
    return chosen[0]


def _has_axes(value: Any, axes: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == axes


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by this package's names."""
    found = {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    for theirs, ours in (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")):
        if theirs in found:
            found[ours] = transposed(found.pop(theirs))
    return found


def _arguments(
    kind: str, tensors: Mapping[str, Any], trainer: dict[str, Any], file: Path
) -> dict[str, Any]:
    if "TopK" not in kind:
        return {}
    stored = tensors.get("k")
    if isinstance(stored, Tensor) and stored.dim() == 0 and not stored.is_complex():
        trainer = {**trainer, "k": stored.item()}
    found: dict[str, Any] = {"k": whole(trainer, "k", file)}
    if kind == "MatryoshkaBatchTopKSAE":
        groups = tensors.get("group_sizes")
        if not isinstance(groups, Tensor) or groups.dim() != 1 or groups.dtype != torch.int64:
            raise refusal(file, "its `group_sizes` are missing or not whole numbers")
        found["prefixes"] = groups.cumsum(0).tolist()
    return found


def _from_on(weights: dict[str, Tensor], guessed: list[str]) -> Tensor:
    """Convert a threshold for `>` to one for `>=`."""
    threshold = weights["threshold"]
    if threshold < 0:
        guessed.append(
            "no threshold, for it has none: every positive pre-activation is a latent, as with "
            "dictionary_learning; train it on, and it gets one"
        )
        return threshold.new_full((), -torch.inf)
    return from_on(threshold, weights)


SITES = ("resid_post", "resid_pre", "mlp_out", "attn_out")


def _source(trainer: dict[str, Any], buffer: dict[str, Any], guessed: list[str]) -> dict[str, Any]:
    layer, submodule = trainer.get("layer"), text(trainer.get("submodule_name"))
    context = buffer.get("ctx_len")
    found = {
        "model": text(trainer.get("lm_name")),
        "context_length": context if isinstance(context, int) else None,
    }
    if not isinstance(layer, int) or isinstance(layer, bool):
        return {**found, "hook_name": None}
    named = re.fullmatch(rf"({'|'.join(SITES)})_layer_(\d+)", submodule or "")
    if named is not None:
        return {**found, "hook_name": f"blocks.{int(named[2])}.hook_{named[1]}"}
    guessed.append(f"that its activations are the residual stream after layer {layer}")
    return {**found, "hook_name": f"blocks.{layer}.hook_resid_post"}


# Writing.


def write(sae: Outgoing, folder: Path) -> None:
    """Write an SAE in the format of dictionary_learning's `load_dictionary`."""
    kind = _dict_class(sae)
    if kind not in NO_CENTRING:
        sae = sae.subtracting(True)
    elif kind == "JumpReluAutoEncoder":
        sae = sae.subtracting(False)
    if kind == "AutoEncoder" and free_rows(sae.weights["W_dec"]) == "free":
        sae = sae._replace(notes=[*sae.notes, NORMALISED])
    tensors = _tensors_of(kind, sae)
    config = {
        "trainer": {
            "dict_class": kind,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            **_place(sae.source),
            **({"k": int(sae.k)} if sae.k is not None and "TopK" in kind else {}),
        },
        "buffer": {"ctx_len": sae.source.get("context_length")},
        "lightning_sae": origin(sae),
    }
    write_files(folder, {WEIGHTS: lambda path: torch.save(tensors, path), CONFIG: as_json(config)})


NORMALISED = (
    "`load_dictionary` makes decoder rows of norm 1, and latents times their norms; "
    "`AutoEncoder.from_pretrained(path, normalize_decoder=False)` leaves them"
)


def _dict_class(sae: Outgoing) -> str:
    if sae.form == "relu":
        return "AutoEncoder" if sae.subtracts else "AutoEncoderNew"
    if sae.form == "gated":
        return "GatedAutoEncoder"
    if sae.k is not None and not float(sae.k).is_integer():
        reason = f"its `k` is {sae.k:g}, and there it is a whole number"
        raise refuse(sae, NAME, reason, "`saelens`, where it has thresholds and no `k`")
    if sae.form == "topk":
        return "AutoEncoderTopK"
    if sae.has_own_thresholds:
        return "JumpReluAutoEncoder"
    return "BatchTopKSAE" if sae.prefixes is None else "MatryoshkaBatchTopKSAE"


def _tensors_of(kind: str, sae: Outgoing) -> dict[str, Tensor]:
    weights = dict(sae.weights)
    if "TopK" in kind:
        weights["k"] = torch.tensor(int(sae.k or 0), dtype=torch.int)
        weights["threshold"] = _shared_threshold(weights)
    if kind == "MatryoshkaBatchTopKSAE":
        widths = torch.tensor([0, *(sae.prefixes or ())])
        weights["group_sizes"] = widths.diff()
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        return weights
    for ours, theirs in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")):
        weights[theirs] = transposed(weights.pop(ours))
    names = {theirs: ours for theirs, ours in RENAMED.items() if theirs in NEEDED[kind]}
    return {**{n: w for n, w in weights.items() if n not in names.values()}} | {
        theirs: weights[ours] for theirs, ours in names.items()
    }


def _shared_threshold(weights: dict[str, Tensor]) -> Tensor:
    """The common threshold of all latents; -1 if every positive pre-activation is a latent."""
    own = weights.get("threshold")
    return torch.tensor(-1.0) if own is None or own[0] <= 0 else own[0].clone()


def _place(source: dict[str, Any]) -> dict[str, Any]:
    """Model and layer; a site without a name in the library keeps its name."""
    hook = source.get("hook_name")
    named = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook if isinstance(hook, str) else "")
    layer = int(named[1]) if named else None
    known = named is not None and named[2] in SITES
    submodule = f"{named[2]}_layer_{layer}" if named and known else hook
    return {"lm_name": source.get("model"), "layer": layer, "submodule_name": submodule}
