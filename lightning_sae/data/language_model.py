"""A causal language model, read and edited at one hook."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_sae.checks import expect
from lightning_sae.data.encoding import ids_of
from lightning_sae.data.hooks import (
    Edit,
    Reached,
    Site,
    edited,
    hooked,
    is_path,
    native_block,
    path_site,
)
from lightning_sae.data.pretrained import MissingTokenizerError
from lightning_sae.data.trial import (
    native_site,
    require_causal,
    require_lens,
    require_rows,
    trial_tokens,
)
from lightning_sae.files import first_line

Tokens = Int[Tensor, "batch seq"]


class LanguageModel:
    """A language model and the hook at which its activations are read or replaced.

    Thread-safe: a lock lets one thread run the model at a time.

    Args:
        network: The model, in evaluation mode: a `transformers` model or a TransformerLens wrapper.
        tokenizer: Called to load its `transformers` tokenizer when it is first needed.
        site: The place of the hook.
        name: Folder or hub name, noted in what is saved.
        hook_name: The hook's name.

    Attributes:
        identity: Plain values that distinguish this model from others.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Callable[[], Any],
        site: Site,
        name: str,
        hook_name: str,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.site = site
        self.name, self.hook_name = name, hook_name
        self.is_lens = hasattr(network, "hook_dict")
        # Device of the returned activations; the weights may be on others, even on several.
        self.device = self._entry
        self._load_tokenizer = tokenizer
        self.identity = {"model": name, **_identity(self)}
        # A hook acts on every forward pass, also on those of other threads.
        self._turn = threading.RLock()

    @property
    def context_length(self) -> int | None:
        """Longest sequence that the model accepts; None if it does not say."""
        if self.is_lens:
            return self.network.cfg.n_ctx
        return getattr(self.network.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def vocabulary(self) -> int:
        """Number of rows of the embedding; token ids are smaller."""
        if self.is_lens:
            return self.network.cfg.d_vocab
        return self.network.get_input_embeddings().weight.shape[0]

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer; None if it has none, which is enough for rows of token ids.

        Raises:
            ValueError: If it belongs to another model, or exists but cannot be loaded.
        """
        try:
            tokenizer = self._load_tokenizer()
        except MissingTokenizerError:
            return None
        if tokenizer is not None and tokenizer.vocab_size > self.vocabulary:
            self._refuse_token(self.vocabulary, tokenizer)
        return tokenizer

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the model's weights and of its activations."""
        return next(p.dtype for p in self.network.parameters() if p.is_floating_point())

    @property
    def _entry(self) -> torch.device:
        """Device of the tokens; accelerate moves them if the model is partly on the disk."""
        device = next(self.network.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def to(self, device: torch.device | str) -> "LanguageModel":
        """Move the weights to a device, and return activations there.

        Weights stay where they are if they were placed by `device_map` or are quantised.
        """
        placed = getattr(self.network, "hf_device_map", None) is not None
        if not placed and not getattr(self.network, "is_quantized", False):
            try:
                self.network.to(device)
            except ValueError as error:  # the message of `transformers` for quantised models
                if "`.to` is not supported" not in str(error):
                    raise
        self.device = torch.device(device)
        return self

    def _logits(self, tokens: Tokens) -> Float[Tensor, "batch _ vocab"]:
        if self.is_lens:
            return self.network(tokens)
        return self.network(tokens, use_cache=False).logits

    def _entering(self, tokens: Tokens) -> Tokens:
        tokens = ids_of(tokens)
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < self.vocabulary:
                self._refuse_token(token, vars(self).get("tokenizer"))
        return tokens.to(self._entry)

    def _refuse_token(self, token: int, tokenizer: Any) -> None:
        text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
        raise ValueError(
            f"Expected tokens below {self.vocabulary}, the rows of the embedding of {self.name}, "
            f"but got token {token}{text}: give the model's own `tokenizer`, or more rows by "
            "`model.resize_token_embeddings`."
        )

    @torch.no_grad()
    def activations(self, tokens: Tokens) -> Float[Tensor, "batch seq d_in"]:
        """Activations at the hook; later layers are not computed."""
        found: list[Tensor] = []

        def keep(activation: Tensor) -> Tensor:
            found.append(activation)
            raise Reached

        with self._turn, edited(self.site, keep, tokens.shape):
            try:
                self._logits(self._entering(tokens))
            except Reached:
                return found[0].to(self.device)
        raise ValueError(
            f"Expected argument `hook_name` to be reached in the forward pass but "
            f"`{self.hook_name}` was not: the model does not compute it; choose another hook."
        )

    @torch.no_grad()
    def logits(self, tokens: Tokens, edit: Edit | None = None) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next tokens, with the activation `x` at the hook replaced by `edit(x)`."""
        with self._turn, self._with_edit(edit, tokens):
            return self._logits(self._entering(tokens))

    @torch.no_grad()
    def final(self, tokens: Tokens, edit: Edit | None = None) -> Float[Tensor, "batch seq _"]:
        """Like `logits`, up to the unembedding: `unembed` turns rows of it into logits."""
        if self._unembedding is None:
            return self.logits(tokens, edit)
        with self._turn, self._with_edit(edit, tokens):
            return self._final(self._entering(tokens), self._unembedding)

    @torch.no_grad()
    def unembed(self, rows: Float[Tensor, "n _"]) -> Float[Tensor, "n vocab"]:
        """Logits of some rows of `final`, for when all logits would not fit in memory."""
        if self._unembedding is None:
            return rows
        with self._turn:
            return self._unembed(rows, self._unembedding)

    def _with_edit(self, edit: Edit | None, tokens: Tokens) -> Any:
        if edit is None:
            return nullcontext()
        return edited(self.site, lambda x: edit(x.to(self.device)).to(x), tokens.shape)

    @cached_property
    def _unembedding(self) -> Site | None:
        """The site of the final activations, if everything after it acts on each token alone."""
        network: Any = self.network
        module = (
            getattr(network, "unembed", None) if self.is_lens else network.get_output_embeddings()
        )
        if module is None:
            return None
        site, tokens = Site(module, "input"), trial_tokens(self.vocabulary)
        with self._turn, self._with_edit(torch.zeros_like, tokens):
            expected = self._logits(self._entering(tokens))
            final = self._final(self._entering(tokens), site)
        logits = self._unembed(final.flatten(0, 1), site).view_as(expected)
        tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
        fits = (logits - expected).abs().max() <= tolerance * expected.abs().max()
        return site if fits else None

    def _final(self, tokens: Tokens, unembedding: Site) -> Float[Tensor, "batch seq _"]:
        found: list[Tensor] = []

        def keep(activation: Tensor) -> Tensor:
            found.append(activation)
            raise Reached

        with hooked(unembedding, keep):
            try:
                self._logits(tokens)
            except Reached:
                return found[0]
        raise AssertionError("the unembedding is not reached")

    def _unembed(self, rows: Float[Tensor, "n _"], unembedding: Site) -> Float[Tensor, "n vocab"]:
        """The model's own map from rows to logits, with its scale, soft cap and so on."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self._entry)
        with self._without_body(), hooked(unembedding, lambda _: rows.unsqueeze(0)):
            return self._logits(token).squeeze(0)

    @contextmanager
    def _without_body(self) -> Iterator[None]:
        """Replace the body, if the model has one, by its stored output for one token."""
        if self._body is None:
            yield
            return
        body, output = self._body
        own = vars(body).get("forward")
        body.forward = lambda *_, **__: output
        try:
            yield
        finally:
            del body.forward
            if own is not None:
                body.forward = own

    @cached_property
    def _body(self) -> tuple[Any, Any] | None:
        """The module that the model calls before its unembedding, and its output for one token."""
        network, token = self.network, torch.zeros(1, 1, dtype=torch.long, device=self._entry)
        for body in () if self.is_lens else (network.base_model, network.get_decoder()):
            found: list[Any] = []
            handle = body.register_forward_hook(lambda *given, found=found: found.append(given[2]))
            try:
                self._logits(token)
            finally:
                handle.remove()
            if found and body is not network:
                return body, found[0]
        return None

    @torch.no_grad()
    def at(self, hook_name: str, head: int | None = None) -> "LanguageModel":
        """The same model at another hook, for which `has` is true.

        Raises:
            ValueError: If there is no such hook, or its activation is not what its name says.
        """
        other = copy.copy(self)
        vars(other).pop("_unembedding", None)
        other.hook_name = hook_name
        other.site = _with_head(self._site(hook_name), hook_name, head)
        return other

    def has(self, hook_name: str) -> bool:
        """Whether a hook can be read without another wrapper around the model.

        Raises:
            ValueError: If the model has too few layers.
        """
        plain = is_path(hook_name) or native_block(self.network, hook_name) is not None
        return self.is_lens or plain

    def _site(self, hook_name: str) -> Site:
        run = self._run
        with self._turn:
            if is_path(hook_name):
                site = path_site(self.network, hook_name)
            elif self.is_lens:
                return require_lens(self.network, run, hook_name, self.vocabulary)
            else:
                found = native_block(self.network, hook_name)
                assert found is not None
                site = native_site(run, *found, hook_name, self.vocabulary)
            require_rows(run, site, hook_name, self.vocabulary)
            return site

    def _run(self, tokens: Tokens) -> Tensor:
        return self._logits(tokens.to(self._entry))

    @torch.no_grad()
    def require_runs(self) -> None:
        """Raise a ValueError unless a forward pass works on the present devices and is causal."""
        tokens = trial_tokens(self.vocabulary, min(7, self.context_length or 7))
        try:
            self._run(tokens)
        except Exception as error:  # kernels of quantised weights raise anything
            raise ValueError(
                f"Expected argument `model` to be a model that runs but a pass of {self.name} over "
                f"{tokens.shape[1]} tokens ends in {type(error).__name__}: {first_line(error)}. "
                "Check `model_kwargs` and `model_dtype`."
            ) from error
        quantized = self.identity["quantization"] is not None
        require_causal(self._run, tokens, self.name, quantized=quantized)

    def width(self) -> int:
        """Width of the activations at the hook, measured on one token."""
        return self.activations(torch.zeros(1, 1, dtype=torch.long)).shape[-1]


def _with_head(site: Site, hook_name: str, head: int | None) -> Site:
    if head is None:
        return site
    if site.heads is None:
        raise ValueError(
            f"Expected argument `hook_name` to be a hook with heads, such as blocks.0.attn.hook_z, "
            f"to go with `head`={head}, but got {hook_name}: leave `head` out, or choose another."
        )
    expect(0 <= head < site.heads, "head", f"from 0 to {site.heads - 1}", head)
    return site._replace(head=head)


def _identity(model: LanguageModel) -> dict[str, Any]:
    config = {} if model.is_lens else vars(model.network.config)
    quantization = config.get("quantization_config")
    method = None if quantization is None else getattr(quantization, "quant_method", "unknown")
    return {
        "model_revision": config.get("_commit_hash"),
        "model_dtype": str(model.weights_dtype).removeprefix("torch."),
        "quantization": None if method is None else str(getattr(method, "value", method)),
    }
