"""Convert a training configuration of SAELens to one for `lightning-sae fit`, as far as possible.

SAELens writes `runner_cfg.json` beside what it trains: a `LanguageModelSAERunnerConfig`, with the
SAE's own settings under `sae`. Read from SAELens 6.54.12.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lightning_sae.interop.reading import read_config, refusal

CLASSES = {
    "standard": "ReLUSAE",
    "gated": "GatedSAE",
    "jumprelu": "JumpReLUSAE",
    "topk": "TopKSAE",
    "batchtopk": "BatchTopKSAE",
    "matryoshka_batchtopk": "MatryoshkaSAE",
}
DATA = {
    "hook_name": "hook_name",
    "model_name": "model",
    "dataset_path": "text",
    "streaming": "streaming",
    "context_size": "context_length",
    "train_batch_size_tokens": "batch_size",
    "store_batch_size_prompts": "blocks_per_pass",
    "hook_head_index": "head",
}
"""Settings of the data that differ only in name."""
MODEL = {
    "lr": "lr",
    "lr_warm_up_steps": "lr_warmup_steps",
    "lr_decay_steps": "lr_decay_steps",
}
SAE = {
    "d_sae": "d_sae",
    "apply_b_dec_to_input": "apply_b_dec_to_input",
    "l1_coefficient": "l1_coefficient",
    "l0_coefficient": "l0_coefficient",
    "target_l0": "target_l0",
    "jumprelu_init_threshold": "threshold_init",
    "jumprelu_bandwidth": "bandwidth",
    "k": "k",
}
"""Settings of the SAE, if its architecture has them."""
USED = {
    *DATA, *MODEL, *SAE, "sae", "architecture", "d_in", "seed", "training_tokens", "prepend_bos",
    "n_batches_in_buffer", "activations_mixing_fraction", "seqpos_slice", "exclude_special_tokens",
    "disable_concat_sequences", "sequence_separator_token", "adam_beta1", "adam_beta2", "autocast",
    "normalize_activations", "l1_warm_up_steps", "l0_warm_up_steps", "matryoshka_widths",
    "topk_threshold_lr", "rescale_acts_by_decoder_norm", "dead_feature_window",
}  # fmt: skip
DEFAULTS = {
    "lr_scheduler_name": "constant", "lp_norm": 1.0, "jumprelu_sparsity_loss_mode": "step",
    "dtype": "float32", "reshape_activations": ("none", "hook_z"), "use_chat_formatting": False,
    "use_cached_activations": False, "from_pretrained_path": None, "autocast_lm": False,
    "model_kwargs": {}, "pre_act_loss_coefficient": None, "jumprelu_ste_to_input": False,
    "use_matryoshka_aux_loss": False, "resume_from_checkpoint": None,
}  # fmt: skip
"""Settings with their only supported values."""
NEEDLESS = {
    "device", "llm_device", "act_store_device", "metadata", "hook_eval", "is_dataset_tokenized",
    "dataset_trust_remote_code", "model_class_name", "model_from_pretrained_kwargs", "verbose",
    "prefetch_llm_batches", "compile_llm", "llm_compilation_mode", "compile_sae", "logger",
    "sae_compilation_mode", "lr_end", "n_restart_cycles", "feature_sampling_window", "output_path",
    "dead_feature_threshold", "n_eval_batches", "eval_batch_size_prompts", "n_checkpoints",
    "checkpoint_path", "save_final_checkpoint", "sae_lens_version", "sae_lens_training_version",
    "n_batches_for_norm_estimate", "cached_activations_path", "use_sparse_activations",
    "jumprelu_tanh_scale",
}  # fmt: skip
"""Settings that affect how SAELens runs, not what it trains."""


class Plan(NamedTuple):
    """A configuration for `lightning-sae fit`.

    Attributes:
        config: The configuration.
        differs: Descriptions of the differences from SAELens.
    """

    config: dict[str, Any]
    differs: list[str]


def plan_of(path: Path) -> Plan:
    """The configuration for `lightning-sae fit` that is closest to a run of SAELens.

    Args:
        path: A `runner_cfg.json`, or the folder with it.

    Raises:
        ValueError: If it is not such a file, or trains something that this package does not
            support.
    """
    of = path / "runner_cfg.json" if path.is_dir() else path
    runner = read_config(of)
    sae = runner.get("sae")
    if not isinstance(sae, dict) or not isinstance(runner.get("training_tokens"), int):
        raise refusal(of, "it has no `sae` and `training_tokens`, as SAELens' runner_cfg.json has")
    architecture = str(sae.get("architecture"))
    if architecture not in CLASSES:
        known = ", ".join(CLASSES)
        raise refusal(of, f"it trains `{architecture:.40}`, and this package has {known}")
    batch = runner.get("train_batch_size_tokens") or 4096
    callbacks = _callbacks(sae)
    config = {
        "seed_everything": runner.get("seed", 42),
        "trainer": {
            "max_steps": runner["training_tokens"] // batch,
            **({"precision": "bf16-mixed"} if runner.get("autocast") else {}),
            **({"callbacks": callbacks} if callbacks else {}),
        },
        "model": {
            "class_path": f"lightning_sae.{CLASSES[architecture]}",
            "init_args": _model(runner, sae, batch),
        },
        "data": {
            "class_path": "lightning_sae.ActivationDataModule",
            "init_args": _data(runner, sae),
        },
    }
    return Plan(config, _differences(runner, sae))


def _callbacks(sae: dict[str, Any]) -> list[dict[str, Any]]:
    warmup = sae.get("l1_warm_up_steps") or sae.get("l0_warm_up_steps")
    path = "lightning_sae.callbacks.L1Warmup"
    return [{"class_path": path, "init_args": {"n_steps": warmup}}] if warmup else []


def _model(runner: dict[str, Any], sae: dict[str, Any], batch: int) -> dict[str, Any]:
    found = {ours: runner[theirs] for theirs, ours in MODEL.items() if theirs in runner}
    found |= {ours: sae[theirs] for theirs, ours in SAE.items() if sae.get(theirs) is not None}
    found["betas"] = [runner.get("adam_beta1", 0.9), runner.get("adam_beta2", 0.999)]
    found["dead_after"] = (runner.get("dead_feature_window") or 1000) * batch
    # Selection by value times norm equals that of an SAE with unit rows.
    found["decoder_norm"] = "unit" if sae.get("rescale_acts_by_decoder_norm") else "free"
    norm = sae.get("decoder_init_norm", 0.1)
    if found["decoder_norm"] == "free" and norm is not None:
        found["decoder_init_norm"] = norm
    if "topk_threshold_lr" in sae and sae["architecture"] == "batchtopk":
        found["threshold_decay"] = 1 - sae["topk_threshold_lr"]
    if "matryoshka_widths" in sae:
        widths = [width for width in sae["matryoshka_widths"] if width != sae.get("d_sae")]
        found["prefixes"] = [*widths, sae.get("d_sae")]
    return found


def _data(runner: dict[str, Any], sae: dict[str, Any]) -> dict[str, Any]:
    found = {
        ours: runner[theirs] for theirs, ours in DATA.items() if runner.get(theirs) is not None
    }
    found["scale"] = sae.get("normalize_activations") == "expected_average_only_in"
    found["buffer_size"] = runner.get("n_batches_in_buffer", 20) * runner.get("context_size", 128)
    found["buffer_size"] = max(found["buffer_size"], 2 * found.get("batch_size", 4096))
    found["refill_fraction"] = 1 - runner.get("activations_mixing_fraction", 0.5)
    found["drop_special_tokens"] = bool(runner.get("exclude_special_tokens"))
    found["pack"] = not runner.get("disable_concat_sequences")
    separator = runner.get("sequence_separator_token", "bos")
    begun = separator == "bos" or runner.get("prepend_bos", True)  # the separator is the BOS
    found["document_start"] = "bos" if begun else "none"
    found["separator"] = "eos" if separator == "eos" else "none"
    positions = runner.get("seqpos_slice") or [None]
    if len(positions) == 2 and None not in positions:
        found["positions"] = positions
    return found


def _differences(runner: dict[str, Any], sae: dict[str, Any]) -> list[str]:
    both = {**runner, **sae}
    found = [
        "`prepend_bos`: here a document begins with BOS, in SAELens each context does",
        "`n_batches_in_buffer`: `data.buffer_size` is in activations, and at least two batches",
    ]
    if sae.get("rescale_acts_by_decoder_norm") or sae.get("decoder_init_norm", 0.1) is None:
        found.append("`decoder_init_norm`: decoder rows start at norm 1 here")
    name, how = str(runner.get("model_name")), sae.get("normalize_activations")
    if "/" not in name:
        found.append(
            f"`model_name` {name}: `data.model` takes hub names and folders, and TransformerLens "
            "has short names of its own"
        )
    if how not in (None, "none", "expected_average_only_in"):
        found.append(f"`normalize_activations` {how!r:.60}: nothing like it here")
    if "aux_loss_coefficient" in sae:
        found.append(
            "`aux_loss_coefficient`: AuxK here is relative to the error, with weight "
            "`revive_coefficient` 1/32"
        )
    if runner.get("sequence_separator_token") not in (None, "bos", "eos"):
        found.append(f"`sequence_separator_token` {runner['sequence_separator_token']}: none here")
    positions = runner.get("seqpos_slice") or [None]
    if positions != [None] and (len(positions) != 2 or None in positions):
        found.append(f"`seqpos_slice` {positions}: `positions` takes a start and an end")
    for name, allowed in DEFAULTS.items():
        value = both.get(name, allowed)
        if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            found.append(f"`{name}` {value!r:.60}: nothing like it here")
    named = {"decoder_init_norm", "aux_loss_coefficient"}
    unknown = both.keys() - USED - NEEDLESS - DEFAULTS.keys() - named
    return [*found, *(f"`{name}`: not known" for name in sorted(unknown))]
