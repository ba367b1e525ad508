"""OpenAI's autoencoders: one file of `torch.save`.

The forward pass, with W and D the weights of `encoder` [d_sae, d_in] and `decoder` [d_in, d_sae]:
f = activation(W (x - pre_bias) + latent_bias), x_hat = D f + pre_bias. If `activation` is `TopK`,
each x is normalised before, by its own mean and standard deviation, and x_hat is taken back with
them; an SAE of this package cannot do that, for `decode` sees no x. The format `openai_normalised`
reads such a file as the SAE of activations that you have normalised. Read from
openai/sparse_autoencoder.
"""

from pathlib import Path
from typing import Any

import torch

from lightning_sae.interop.found import (
    RAW,
    Found,
    free_rows,
    part,
    require_sizes,
    transposed,
    whole,
)
from lightning_sae.interop.outgoing import Outgoing
from lightning_sae.interop.reading import names_in_pt, pick, read_pt, refusal
from lightning_sae.interop.writing import as_json, origin, refuse, write_files

NAME = "openai"
WEIGHTS, CONFIG = "autoencoder.pt", "lightning_sae.json"
FILES = "a .pt file of pre_bias, latent_bias, encoder.weight and decoder.weight"
NEEDED = {"pre_bias": 1, "encoder.weight": 2, "latent_bias": 1}
DECODER = {"decoder.weight": 2, "decoder.linear.weight": 2}
STATISTICS = (
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation",
    "activation_state_dict", "activation.k", "activation.postact_fn",
)  # fmt: skip
"""Entries that are not weights; the TopK is described twice."""


def _file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def recognises(path: Path) -> bool:
    """Whether a folder or file is in this format."""
    return names_in_pt(_file(path)) >= NEEDED.keys()


def read(path: Path, _wanted: str | None = None) -> Found:
    """The SAE in a file, unless it normalises each activation.

    Raises:
        ValueError: If it is damaged or normalises.
    """
    found = read_normalised(path)
    if found.architecture == "TopKSAE":
        raise refusal(
            _file(path),
            "it divides each activation by its own standard deviation, and `decode` cannot undo "
            "that. The nearest: give `format='openai_normalised'`, for the SAE of activations "
            "from which you have taken their mean, and which you have divided by their deviation",
        )
    return found


def read_normalised(path: Path, _wanted: str | None = None) -> Found:
    """The SAE in a file, as of activations that are normalised already where it does that.

    Raises:
        ValueError: If it is damaged.
    """
    file = _file(path)
    content = read_pt(file)
    if not isinstance(content, dict):
        raise refusal(file, f"it holds a {type(content).__name__}, not tensors by name")
    found = pick(content, file, NEEDED, DECODER, STATISTICS)
    W_enc = transposed(found["encoder.weight"])
    tied = "decoder.weight" not in found
    weights = {
        "W_enc": W_enc,
        "b_enc": found["latent_bias"],
        "W_dec": found["encoder.weight"] if tied else transposed(found["decoder.weight"]),
        "b_dec": found["pre_bias"],
    }
    require_sizes(file, weights)
    activation, units = content.get("activation", "ReLU"), RAW
    arguments: dict[str, Any] = {}
    if activation == "TopK":
        described = part(content, "activation_state_dict", file)
        if described.get("postact_fn", "ReLU") != "ReLU":
            raise refusal(file, "its TopK is not followed by a ReLU, so latents can be negative")
        arguments["k"] = whole(described, "k", file)
        units = "of inputs normalised row by row, to mean 0 and standard deviation 1, before it"
    elif activation != "ReLU":
        raise refusal(file, f"its `activation` is {activation!r:.40}, not ReLU or TopK")
    return Found(
        architecture="TopKSAE" if activation == "TopK" else "ReLUSAE",
        arguments={
            **arguments,
            "apply_b_dec_to_input": True,
            "decoder_norm": free_rows(weights["W_dec"]),
        },
        weights=weights,
        source={},
        units=units,
        guessed=["as of no model and hook, for its file says none"],
        rest={},
    )


def write(sae: Outgoing, folder: Path) -> None:
    """Write an SAE in the format of OpenAI's `Autoencoder.from_state_dict`, to `autoencoder.pt`."""
    if sae.form != "relu":
        reason = "there, latents are positive pre-activations, or those of normalised inputs"
        raise refuse(sae, NAME, reason, "`saelens` or `dictionary_learning`")
    sae = sae.subtracting(True)
    content = {
        "pre_bias": sae.weights["b_dec"],
        "latent_bias": sae.weights["b_enc"],
        "stats_last_nonzero": torch.zeros(sae.d_sae, dtype=torch.long),
        "latents_activation_frequency": torch.ones(sae.d_sae),
        "latents_mean_square": torch.zeros(sae.d_sae),
        "encoder.weight": transposed(sae.weights["W_enc"]),
        "decoder.weight": transposed(sae.weights["W_dec"]),
        "activation": "ReLU",
        "activation_state_dict": {},
    }
    files = {WEIGHTS: lambda path: torch.save(content, path), CONFIG: as_json(origin(sae))}
    write_files(folder, files)


def write_normalised(sae: Outgoing, _folder: Path) -> None:
    """Refuse: an SAE on raw activations cannot be converted to one on normalised activations."""
    reason = "the file would be of inputs that are normalised, as its own are not"
    raise refuse(sae, "openai_normalised", reason, "`saelens` or `dictionary_learning`")
