"""A causal language model, read and edited at one hook."""

import copy
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sae.data.encoding import ids_of
from lightning_sae.data.hooks import Edit, Site, edited, lens_site, native_site
from lightning_sae.functional.sparse.memory import keep_freed_blocks

Tokens = Int[Tensor, "batch seq"]


class Reached(Exception):
    """Ends a forward pass at the hook: what lies behind it need not be computed."""


class LanguageModel:
    """A language model and the hook at which its activations are read or replaced.

    Several threads may use it; they take turns.

    Args:
        network: The model, in evaluation mode.
        logits: Its logits from tokens.
        tokenizer: Its `transformers` tokenizer.
        site: Where the hook lies.
        name: Folder or hub name, noted in what is saved.
        hook_name: The hook's TransformerLens name.
        context_length: Longest sequence the model takes; None if it does not say.
    """

    def __init__(
        self,
        network: nn.Module,
        logits: Callable[[Tokens], Float[Tensor, "batch seq vocab"]],
        tokenizer: Any,
        site: Site,
        name: str,
        hook_name: str,
        context_length: int | None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.site = site
        self.name, self.hook_name = name, hook_name
        self.context_length = context_length
        self._logits = logits
        # A hook acts on every forward pass, another thread's too.
        self._turn = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Where the model's weights lie."""
        return next(self.network.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        if hasattr(self.network, "hook_dict"):
            return self.network.cfg.d_vocab  # type: ignore[union-attr, return-value]
        return self.network.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    def to(self, device: torch.device | str) -> "LanguageModel":
        """Move the model's weights."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def activations(self, tokens: Tokens) -> Float[Tensor, "batch seq d_in"]:
        """Activations at the hook; nothing behind the hook is computed."""
        found: list[Tensor] = []

        def keep(activation: Tensor) -> Tensor:
            found.append(activation)
            raise Reached

        with self._turn, edited(self.site, keep):
            try:
                self._logits(ids_of(tokens).to(self.device))
            except Reached:
                return found[0]
        raise ValueError(
            f"Expected argument `hook_name` to be reached in the forward pass but "
            f"`{self.hook_name}` was not: the model does not compute it; choose another hook."
        )

    @torch.no_grad()
    def logits(self, tokens: Tokens, edit: Edit | None = None) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next tokens, with the activation at the hook replaced by `edit` of it."""
        tokens = ids_of(tokens).to(self.device)
        with self._turn, nullcontext() if edit is None else edited(self.site, edit):
            return self._logits(tokens)

    def has(self, hook_name: str) -> bool:
        """Whether a hook can be read without another wrapper round the model.

        Raises:
            ValueError: If the model has not so many layers.
        """
        lens = hasattr(self.network, "hook_dict")
        return lens or native_site(self.network, hook_name) is not None

    def at(self, hook_name: str) -> "LanguageModel":
        """The same model at another hook that it `has`.

        Raises:
            ValueError: If there is no such hook.
        """
        other, lens = copy.copy(self), hasattr(self.network, "hook_dict")
        site = (lens_site if lens else native_site)(self.network, hook_name)
        assert site is not None
        other.site, other.hook_name = site, hook_name
        return other

    def width(self) -> int:
        """Width of the activations at the hook, seen on one token."""
        return self.activations(torch.zeros(1, 1, dtype=torch.long)).shape[-1]


def load_language_model(
    model: str | Path | nn.Module, hook_name: str, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a language model, or take one that is loaded.

    Args:
        model: Folder or hub name of a `transformers` model, or an instance of TransformerBridge,
            HookedTransformer or a `transformers` causal model (its tokenizer is then looked up
            under its `name_or_path`).
        hook_name: TransformerLens name of the hook.
        dtype: The weights' dtype, where the model is loaded here.

    Raises:
        ValueError: If the folder is missing, the hub is out of reach, or there is no such hook.
    """
    if isinstance(model, nn.Module):
        return _from_instance(model, hook_name)
    name = _checked_name(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        keep_freed_blocks()
        network = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"`model`={name} holds no causal language model: {error}") from error
        return _from_lens(_boot(name, dtype, error), hook_name, name)
    site = native_site(network, hook_name)
    if site is None:
        booted = _from_lens(_boot(name, dtype), hook_name, name)
        booted.tokenizer = tokenizer  # as it was saved: TransformerLens makes one with a BOS
        return booted
    return _native(network, tokenizer, site, name, hook_name)


def _checked_name(model: str | Path) -> str:
    name = os.path.expanduser(model)  # a Path would lose the dot of ./name
    is_path = isinstance(model, Path) or name.startswith(("/", ".")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(
            f"Expected argument `model` to be a model's folder or hub name but there is no folder "
            f"{name}: check the path."
        )
    return name


def _boot(name: str, dtype: torch.dtype, earlier: Exception | None = None) -> nn.Module:
    """Load by TransformerLens, which also knows models that `transformers` does not."""
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(name, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if Path(name).is_dir():
            raise ValueError(
                f"TransformerLens, which alone knows this `hook_name`, cannot load `model`={name}: "
                f"choose a common hook, such as blocks.0.hook_resid_post. Its answer: {error}"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"Could not load `model`={name}: it is no local folder, and the hub did not give "
            f"it{offline}. Check the name and the network, or give a local folder. The hub's "
            f"answer: {earlier or error}"
        ) from error


def _from_instance(model: Any, hook_name: str) -> LanguageModel:
    if hasattr(model, "hook_dict"):
        return _from_lens(model, hook_name, str(model.cfg.model_name))
    from transformers import AutoTokenizer

    name = str(model.config.name_or_path)
    site = native_site(model, hook_name)
    if site is None:
        raise ValueError(
            f"Expected argument `hook_name` to be a hook of a plain `transformers` model "
            f"(resid_pre, resid_post, attn_out, mlp_out, attn.hook_z, mlp.hook_post) but got "
            f"`{hook_name}`: give the model as a TransformerBridge, folder or name instead."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected argument `model` to have a tokenizer at its `config.name_or_path` but "
            f"there is none at `{name}`: save model and tokenizer in one folder and give that. "
            f"{error}"
        ) from error
    return _native(model, tokenizer, site, name, hook_name)


def _native(network: Any, tokenizer: Any, site: Site, name: str, hook_name: str) -> LanguageModel:
    def logits(tokens: Tokens) -> Float[Tensor, "batch seq vocab"]:
        return network(tokens, use_cache=False).logits

    config = network.config
    longest = getattr(config, "max_position_embeddings", None)
    return LanguageModel(network, logits, tokenizer, site, name, hook_name, longest)


def _from_lens(model: Any, hook_name: str, name: str) -> LanguageModel:
    site = lens_site(model, hook_name)
    return LanguageModel(model, model, model.tokenizer, site, name, hook_name, model.cfg.n_ctx)
