"""Several hooks of one language model, read in one forward pass and concatenated in each row."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_sae.data.hooks import Reached, edited
from lightning_sae.data.language_model import LanguageModel, Tokens
from lightning_sae.data.load_model import load_language_model


class SeveralHooks(LanguageModel):
    """A language model whose activations are those of several hooks, concatenated.

    A forward pass ends at the hook that is reached last.

    Args:
        at_each: The model at each hook; all share one network.
    """

    def __init__(self, at_each: Sequence[LanguageModel]) -> None:
        vars(self).update(vars(at_each[0]))  # they differ only in the hook
        self.hook_name = ", ".join(model.hook_name for model in at_each)
        self.at_each = {model.hook_name: model for model in at_each}

    @cached_property
    def widths(self) -> dict[str, int]:
        """Width of the activations at each hook, measured on one token."""
        found = self._read(torch.zeros(1, 1, dtype=torch.long))
        return {name: activations.shape[-1] for name, activations in found.items()}

    @override
    def width(self) -> int:
        """Width of a row with all hooks."""
        return sum(self.widths.values())

    @override
    def activations(self, tokens: Tokens) -> Float[Tensor, "batch seq d_in"]:
        """Activations of all hooks; layers after the last hook are not computed."""
        return torch.cat(list(self._read(tokens).values()), -1)

    def split(self, rows: Float[Tensor, "... d_in"]) -> dict[str, Float[Tensor, "..."]]:
        """Rows by hook, equal to those read at that hook alone."""
        parts = rows.split(list(self.widths.values()), -1)
        return {name: part.contiguous() for name, part in zip(self.widths, parts, strict=True)}

    @torch.no_grad()
    def _read(self, tokens: Tokens) -> dict[str, Float[Tensor, "batch seq _"]]:
        found: dict[str, Tensor] = {}
        with self._turn, ExitStack() as stack:
            for name, model in self.at_each.items():

                def keep(activation: Tensor, name: str = name) -> Tensor:
                    found[name] = activation.clone()  # may change in place later
                    if len(found) == len(self.at_each):
                        raise Reached
                    return activation

                stack.enter_context(edited(model.site, keep, tokens.shape))
            try:
                self._logits(self._entering(tokens))
            except Reached:
                return {name: found[name].to(self.device) for name in self.at_each}
        missed = [name for name in self.at_each if name not in found]
        raise ValueError(
            f"Expected argument `hook_name` to be reached in the forward pass but "
            f"{', '.join(missed)} were not: the model does not compute them; choose other hooks."
        )


def load_at_hooks(
    model: str | Path | nn.Module,
    hook_names: Sequence[str],
    dtype: torch.dtype | None = None,
    *,
    head: int | None = None,
    **arguments: Any,
) -> SeveralHooks:
    """Load a language model once for several hooks; see `load_language_model`.

    Raises:
        ValueError: As `load_language_model` does; the message names the hook.
    """
    loaded = load_language_model(model, hook_names[0], dtype, **arguments)
    for name in hook_names[1:]:
        if not loaded.has(name):  # TransformerLens knows it, and the others too
            loaded = load_language_model(model, name, dtype, **arguments)
            break
    return SeveralHooks([loaded.at(name, head) for name in hook_names])


def checked_names(hook_name: str | Sequence[str]) -> list[str]:
    """Names of hooks as a list.

    Raises:
        ValueError: If there is none, or one is named twice.
    """
    names = [hook_name] if isinstance(hook_name, str) else list(hook_name)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected argument `hook_name` to be a hook, or a list of different hooks, but got "
            f"{names}: name each once."
        )
    return names


def require_same_hooks(saved: Sequence[str], present: Sequence[str]) -> None:
    """Raise a ValueError if rows of a checkpoint hold other hooks, or in another order."""
    if list(saved) != list(present):
        raise ValueError(
            f"Expected argument `hook_name` to be {', '.join(saved)}, as in the checkpoint, but "
            f"got {', '.join(present)}: resume with the settings of the run."
        )
