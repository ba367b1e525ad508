"""Load language models and tokenizers from a folder or the hub, with clear errors."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_sae.functional.sparse.memory import keep_freed_blocks

FOR_ALL_FILES = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")
"""Arguments of `from_pretrained` that are also passed to the configuration and tokenizer."""

OWN = ("dtype", "torch_dtype", "config", "output_loading_info", "state_dict")


class MissingTokenizerError(ValueError):
    """There is no tokenizer, or an empty one."""


def checked_name(model: str | Path) -> str:
    """A folder or hub name as `transformers` takes it.

    Raises:
        ValueError: If it can only be a folder, and the folder does not exist.
    """
    name = os.path.expanduser(model)  # a Path would lose the dot of ./name
    is_path = isinstance(model, Path) or name.startswith(("/", ".")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(
            f"Expected argument `model` to be a model's folder or hub name but there is no folder "
            f"{name}: check the path."
        )
    return name


def checked_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """`model_kwargs`, with `trust_remote_code` off unless it is there.

    Raises:
        ValueError: If an argument must be set elsewhere.
    """
    given = dict(arguments or {})
    for name in OWN:
        if name in given:
            remedy = "set `model_dtype`" if "dtype" in name else "leave it out"
            raise ValueError(
                f"Expected argument `model_kwargs` to hold further arguments of `from_pretrained` "
                f"but got `{name}`: {remedy}."
            )
    return {"trust_remote_code": False, **given}


def load_network(name: str, dtype: torch.dtype | None, arguments: Mapping[str, Any]) -> Any:
    """Load a causal language model; of a multimodal model, the language model is used.

    Args:
        name: Folder or hub name, of a model or of a PEFT adapter.
        dtype: The weights' dtype; None for the checkpoint's.
        arguments: Further arguments of `from_pretrained`.

    Raises:
        OSError: If it cannot be downloaded from the hub.
        ValueError: If it is not a causal language model, or cannot be loaded.
    """
    keep_freed_blocks()
    kind = _model_class(_config(name, arguments), name)
    try:
        network, found = kind.from_pretrained(
            name, dtype=dtype or "auto", output_loading_info=True, **arguments
        )
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"Could not load the weights of `model`={name}{_with(arguments)}: {error}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"Expected argument `model` to be a causal language model but the checkpoint of {name} "
            f"lacks {len(missing)} of its weights ({', '.join(missing[:3])}), which would be "
            "random: give a checkpoint with its language-modelling head."
        )
    return network


def _with(arguments: Mapping[str, Any]) -> str:
    given = {k: v for k, v in arguments.items() if (k, v) != ("trust_remote_code", False)}
    given.pop("token", None)
    return f" with `model_kwargs`={given}" if given else ""


def _config(name: str, arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    for_files = _for_all_files(arguments)
    base = _adapted(name, for_files) or name
    try:
        return AutoConfig.from_pretrained(base, **for_files)
    except (OSError, ValueError, KeyError) as error:
        if not Path(base).is_dir():
            raise OSError(str(error)) from error
        hint = (
            " Set `model_kwargs.trust_remote_code` to true if you trust it."
            if "trust_remote_code" in str(error)
            else ""
        )
        raise ValueError(f"`model`={base} holds no causal language model: {error}{hint}") from error


def _for_all_files(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in FOR_ALL_FILES if key in arguments}


def _adapted(name: str, arguments: Mapping[str, Any]) -> str | None:
    """The base model of a PEFT adapter; None if `name` is not an adapter."""
    import json

    from transformers.utils.peft_utils import find_adapter_config_file

    searched = {k: v for k, v in arguments.items() if k != "trust_remote_code"}
    file = find_adapter_config_file(name, **searched)
    if file is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"`model`={name} is a PEFT adapter, and peft is not installed: `pip install peft`, or "
            "merge the adapter into its model and give that."
        )
    return json.loads(Path(file).read_text())["base_model_name_or_path"]


def _model_class(config: Any, name: str) -> Any:
    """The class to load it with.

    Raises:
        ValueError: If it is not a causal language model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not config.get_text_config().is_encoder_decoder:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or remote:
            return AutoModelForCausalLM
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText
    kind = "an encoder and a decoder" if config.is_encoder_decoder else "another kind of model"
    raise ValueError(
        f"`model`={name} holds no causal language model but {kind} ({config.model_type}): give a "
        "model that predicts the next token."
    )


def load_tokenizer(name: str, arguments: Mapping[str, Any]) -> Any:
    """Load the tokenizer of a folder or hub name.

    Raises:
        MissingTokenizerError: If there is none.
    """
    from transformers import AutoTokenizer

    for_files = _for_all_files(arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **for_files)
    except Exception as error:  # missing or damaged files raise errors of many types
        if not name:
            raise MissingTokenizerError(_no_tokenizer("the model", "it has no name")) from error
        base = _adapted(name, for_files)
        if base is not None:
            return load_tokenizer(base, arguments)
        raise MissingTokenizerError(_no_tokenizer(name, str(error))) from error
    # Without the files, some classes create a tokenizer with an empty vocabulary.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise MissingTokenizerError(_no_tokenizer(name, "it has no vocabulary"))
    return tokenizer


def _no_tokenizer(name: str, reason: str) -> str:
    return (
        f"There is no tokenizer in {name} ({' '.join(reason.split())}): save one there with "
        "`tokenizer.save_pretrained`, or give `tokenizer`, a folder, hub name or instance."
    )
