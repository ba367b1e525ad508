"""Find and load a language model, and resolve its hook."""

import copy
import os
from abc import ABC
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_sae.data.hooks import Site, is_path, native_block
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.pretrained import (
    checked_arguments,
    checked_name,
    load_network,
    load_tokenizer,
)
from lightning_sae.data.trial import trial_tokens

if TYPE_CHECKING:
    LoadedModel = nn.Module
else:

    class LoadedModel(ABC):  # noqa: B024
        """Stands for `nn.Module`, whose many subclasses `--help` would list."""

    LoadedModel.register(nn.Module)


def load_language_model(
    model: str | Path | nn.Module,
    hook_name: str,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    head: int | None = None,
) -> LanguageModel:
    """Load a language model, or take a loaded one, and check the hook.

    Args:
        model: Folder or hub name of a `transformers` model or a PEFT adapter, or an instance of
            TransformerBridge, HookedTransformer or a `transformers` causal model (its tokenizer is
            then loaded from its `name_or_path`, unless given).
        hook_name: TransformerLens name of the hook, or a module's path with `:in` or `:out`.
        dtype: The weights' dtype, if the model is loaded here; None for the checkpoint's.
        tokenizer: A tokenizer, or its folder or hub name; by default the model's.
        model_kwargs: Further arguments of `from_pretrained`.
        head: For a hook with heads, the one to read and replace; None for all, concatenated.

    Raises:
        ValueError: If the folder is missing or holds no causal language model, the hub cannot be
            reached, there is no such hook, or it is not what its name says.
    """
    arguments = checked_arguments(model_kwargs)
    loaded = _loaded(model, hook_name, dtype, tokenizer, arguments, model_kwargs)
    loaded.require_runs()
    return loaded.at(hook_name, head)


def _loaded(
    model: str | Path | nn.Module,
    hook_name: str,
    dtype: torch.dtype | None,
    tokenizer: Any,
    arguments: Mapping[str, Any],
    given: Mapping[str, Any] | None,
) -> LanguageModel:
    """The model, without a hook yet."""
    nowhere = Site(nn.Identity(), "output")

    def tokenizer_of(name: str) -> Callable[[], Any]:
        where = tokenizer if isinstance(tokenizer, str | Path) else name
        is_given = tokenizer is not None and not isinstance(tokenizer, str | Path)
        return lambda: tokenizer if is_given else load_tokenizer(str(where), arguments)

    if isinstance(model, nn.Module):
        _check_instance(model, hook_name, dtype, given)
        if hasattr(model, "hook_dict"):
            own: Any = model
            found = (lambda: own.tokenizer) if tokenizer is None else tokenizer_of("")
            return LanguageModel(model, found, nowhere, str(own.cfg.model_name), hook_name)
        name = str(model.config.name_or_path)  # type: ignore[union-attr]
        return LanguageModel(model, tokenizer_of(name), nowhere, name, hook_name)
    name = checked_name(model)
    try:
        network = load_network(name, dtype, arguments)
    except OSError as error:
        wrapped = _boot(name, error, dtype=dtype or torch.float32)
        found = (lambda: wrapped.tokenizer) if tokenizer is None else tokenizer_of("")
        return LanguageModel(wrapped, found, nowhere, name, hook_name)
    plain = LanguageModel(network, tokenizer_of(name), nowhere, name, hook_name)
    if plain.has(hook_name):
        return plain
    return _in_lens(plain)


def _in_lens(plain: LanguageModel) -> LanguageModel:
    """A loaded model in TransformerLens' wrapper, for hooks that only TransformerLens knows.

    Raises:
        ValueError: If TransformerLens rejects it, or computes other logits.
    """
    tokens = trial_tokens(plain.vocabulary)
    expected = plain.logits(tokens)
    network = plain.network
    tokenizer = copy.deepcopy(plain.tokenizer)  # TransformerLens adds tokens to it
    wrapped = _boot(
        plain.name, None, dtype=plain.weights_dtype, hf_model=network, tokenizer=tokenizer
    )
    found = LanguageModel(wrapped, lambda: plain.tokenizer, plain.site, plain.name, plain.hook_name)
    found.identity = plain.identity
    gap = (found.logits(tokens).to(expected) - expected).abs().max()
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    if not gap <= tolerance * expected.abs().max():
        raise ValueError(
            f"Expected argument `hook_name` to be a common hook (resid_pre, resid_post, attn_out, "
            f"mlp_out, attn.hook_z, mlp.hook_post) or a module's path but got `{plain.hook_name}`: "
            f"TransformerLens, which alone knows it, computes other logits than {plain.name}."
        )
    return found


def _check_instance(
    model: Any, hook_name: str, dtype: torch.dtype | None, given: Mapping[str, Any] | None
) -> None:
    if given:
        raise ValueError(
            "Expected argument `model_kwargs` to go with a folder or hub name but `model` is "
            "loaded: load it with these arguments."
        )
    if hasattr(model, "hook_dict"):
        return
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ValueError(
            f"Expected argument `model` to be a causal language model of `transformers`, a "
            f"TransformerBridge or a HookedTransformer but got a {type(model).__name__}: load it "
            "by AutoModelForCausalLM."
        )
    if not is_path(hook_name) and native_block(model, hook_name) is None:
        raise ValueError(
            f"Expected argument `hook_name` to be a hook of a plain `transformers` model "
            f"(resid_pre, resid_post, attn_out, mlp_out, attn.hook_z, mlp.hook_post, or a module's "
            f"path) but got `{hook_name}`: give the model as a TransformerBridge, folder or name "
            "instead."
        )
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype not in (None, own):
        raise ValueError(
            f"Expected argument `model_dtype` to be auto or {own}, for `model` is loaded, but got "
            f"{dtype}: load it in that dtype."
        )


def _boot(name: str, earlier: Exception | None, **arguments: Any) -> Any:
    """Load by TransformerLens, which also knows models that `transformers` does not."""
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(name, **arguments)
    except Exception as error:  # TransformerLens raises errors of many types
        if earlier is None:
            raise ValueError(
                f"TransformerLens, which alone knows this `hook_name`, cannot load `model`={name}: "
                f"choose a common hook, such as blocks.0.hook_resid_post, or a module's path. Its "
                f"answer: {error}"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"Could not load `model`={name}: it is not a local folder, and the hub did not give "
            f"it{offline}. Check the name and the network, or give a local folder. The hub's "
            f"answer: {earlier}"
        ) from error
