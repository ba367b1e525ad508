"""SAEs that the other libraries train, a little, with their own trainers, and save."""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from benchmarks.interop.compare import Side
from benchmarks.interop.libraries import dictionary_learning, of_sparse_coder, saelens

STEPS, ROWS, D_SAE, K = 100, 512, 512, 16


class Theirs(NamedTuple):
    """An SAE that another library trained and saved.

    Attributes:
        library: Which one.
        name: What it is, in words.
        folder: What it saved.
        side: What it computes.
    """

    library: str
    name: str
    folder: Path
    side: Side


def trained(x: Float[Tensor, "rows d_in"], root: Path) -> Iterator[Theirs]:
    """SAEs of all libraries, trained on activations `x`."""
    yield from of_saelens(x, root / "saelens")
    yield from of_dictionary_learning(x, root / "dictionary_learning")
    yield from of_sparsify(x, root / "sparsify")


def batches(x: Float[Tensor, "rows d_in"]) -> Iterator[Tensor]:
    """Batches without an end, drawn anew from `x`."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield x[torch.randint(len(x), (ROWS,), generator=generator)]


SCALED = {"normalize_activations": "expected_average_only_in"}
SAELENS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("standard", {"l1_coefficient": 1.0}),
    ("standard", {"l1_coefficient": 1.0, **SCALED}),
    ("standard", {"l1_coefficient": 1.0, **SCALED, "apply_b_dec_to_input": False}),
    ("standard", {"l1_coefficient": 1.0, "normalize_activations": "layer_norm"}),
    ("standard", {"l1_coefficient": 1.0, "dtype": "bfloat16"}),
    ("gated", {"l1_coefficient": 1.0}),
    ("gated", {"l1_coefficient": 1.0, **SCALED}),
    ("jumprelu", {"l0_coefficient": 1.0}),
    ("jumprelu", {"l0_coefficient": 1.0, **SCALED}),
    ("topk", {"k": K}),
    ("topk", {"k": K, **SCALED}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": False, **SCALED}),
    ("batchtopk", {"k": K}),
    ("batchtopk", {"k": K + 0.5, **SCALED}),
    ("batchtopk", {"k": K, "rescale_acts_by_decoder_norm": False, **SCALED}),
    ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [64, 256, 512], **SCALED}),
)


def of_saelens(x: Float[Tensor, "rows d_in"], root: Path) -> Iterator[Theirs]:
    """By `SAETrainer.fit`, and saved for inference."""
    for number, (name, settings) in enumerate(SAELENS):
        torch.manual_seed(0)
        cls, config = get_sae_training_class(name)
        sae: Any = cls(config(d_in=x.shape[1], d_sae=D_SAE, **settings))
        plan = SAETrainerConfig(
            STEPS * ROWS, ROWS, lr=2e-3, lr_end=2e-4, n_batches_for_norm_estimate=4
        )
        data = (batch.to(sae.dtype) for batch in batches(x))
        with contextlib.redirect_stderr(io.StringIO()):
            SAETrainer(plan, sae, data).fit()
        folder = root / str(number)
        sae.save_inference_model(folder)
        yield Theirs("saelens", _in_words(name, settings), folder, saelens(folder))


DICTIONARY_LEARNING: tuple[tuple[type, dict[str, Any]], ...] = (
    (StandardTrainer, {"l1_penalty": 0.1}),
    (StandardTrainerAprilUpdate, {"l1_penalty": 0.1}),
    (GatedSAETrainer, {"l1_penalty": 0.1}),
    (JumpReluTrainer, {"target_l0": 20.0}),
    (TopKTrainer, {"k": K}),
    (BatchTopKTrainer, {"k": K}),
    (MatryoshkaBatchTopKTrainer, {"k": K, "group_fractions": [0.125, 0.375, 0.5]}),
)


def of_dictionary_learning(x: Float[Tensor, "rows d_in"], root: Path) -> Iterator[Theirs]:
    """By `trainSAE`, with activations as they are and normalised."""
    for normalised in (False, True):
        for kind, settings in DICTIONARY_LEARNING:
            folder = root / f"{kind.__name__}-{normalised}"
            common = {"activation_dim": x.shape[1], "dict_size": D_SAE, "layer": 2, "lm_name": "e"}
            length = {"steps": STEPS, "warmup_steps": 10, "lr": 2e-3, "device": "cpu", "seed": 0}
            own = dict(settings)
            if "l1_penalty" in own or "target_l0" in own:
                own["sparsity_warmup_steps"] = 20
            else:
                own["threshold_start_step"] = 20
            config = {"trainer": kind, **common, **length, **own}
            with contextlib.redirect_stderr(io.StringIO()):
                trainSAE(
                    batches(x),
                    [config],
                    STEPS,
                    save_dir=str(folder),
                    normalize_activations=normalised,
                    device="cpu",
                )
            shown = {**settings, "normalize_activations": normalised}
            saved = folder / "trainer_0"
            name = _in_words(kind.__name__, shown)
            yield Theirs("dictionary_learning", name, saved, dictionary_learning(saved))


SPARSIFY: tuple[dict[str, Any], ...] = (
    {"k": K, "num_latents": D_SAE},
    {"k": K, "expansion_factor": 4},
    {"k": K, "num_latents": D_SAE, "activation": "groupmax"},
    {"k": K, "num_latents": D_SAE, "transcode": True, "skip_connection": True},
)


def of_sparsify(x: Float[Tensor, "rows d_in"], root: Path) -> Iterator[Theirs]:
    """By its `SparseCoder` and Adam; its trainer wants a language model of its own."""
    for number, settings in enumerate(SPARSIFY):
        torch.manual_seed(0)
        coder = SparseCoder(x.shape[1], SparseCoderConfig(**settings))
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3 / math.sqrt(D_SAE / 2**14))
        for _, batch in zip(range(STEPS), batches(x), strict=False):
            optimizer.zero_grad()
            coder(batch).fvu.backward()
            optimizer.step()
            coder.set_decoder_norm_to_unit_norm()
        folder = root / str(number) / "layers.2"
        coder.save_to_disk(folder)
        side = of_sparse_coder(SparseCoder.load_from_disk(folder))
        yield Theirs("sparsify", _in_words("SparseCoder", settings), folder, side)


def _in_words(name: str, settings: dict[str, Any]) -> str:
    return ", ".join([name, *(f"{key}={value}" for key, value in settings.items())])
