"""What a stream of activations has at its hooks: the model, widths, scaling."""

import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_sae.data.buffer import ShuffleBuffer
from lightning_sae.data.language_model import LanguageModel, load_language_model
from lightning_sae.data.loaders import Rows
from lightning_sae.data.scaling import Scaling, estimate_scaling
from lightning_sae.data.several_hooks import SeveralHooks, load_at_hooks

Data = TypeVar("Data", bound="AtHooks")


class AtHooks(LightningDataModule):
    """The part of `ActivationDataModule` that is one hook's, or each hook's where it has several.

    Attributes:
        hook_name: The hook, or a list of them.
        hook_names: The hooks as a list.
    """

    hook_name: Any
    hook_names: list[str]
    model: str | Path | nn.Module
    model_dtype: torch.dtype
    context_length: int
    center: bool
    scale: bool
    buffer: ShuffleBuffer | None
    _scalings: dict[str, Scaling]

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model, loaded when first needed."""
        if isinstance(self.hook_name, str):
            model = load_language_model(self.model, self.hook_name, self.model_dtype)
        else:
            model = load_at_hooks(self.model, self.hook_names, self.model_dtype)
        longest = model.context_length
        if longest is not None and self.context_length > longest:
            raise ValueError(
                f"Expected argument `context_length` to be at most {longest}, the context of the "
                f"model, but got {self.context_length}: make it shorter."
            )
        return model

    @cached_property
    def d_in(self) -> Any:
        """Width of the activations, seen on one token; a dictionary by hook of several."""
        model = self.language_model
        return model.widths if isinstance(model, SeveralHooks) else model.width()

    def by_hook(self, rows: Float[Tensor, "rows d"]) -> Rows:
        """Rows as a batch has them: by hook if there are several."""
        model = self.language_model
        return model.split(rows) if isinstance(model, SeveralHooks) else rows

    def at(self: Data, hook_name: str) -> Data:
        """The same data, of a run that may be under way, with one of its hooks alone.

        Its language model, width, filter, source and scaling are the hook's.
        """
        if not isinstance(self.language_model, SeveralHooks):
            return self
        one, scalings = copy.copy(self), self.scalings
        one.hook_name, one.hook_names = hook_name, [hook_name]
        one._scalings = {hook_name: scalings[hook_name]} if scalings else {}
        model = self.language_model
        vars(one).update(language_model=model.at_each[hook_name], d_in=model.widths[hook_name])
        vars(one).pop("filter", None)  # that of all hooks
        return one

    @property
    def scaling(self) -> Scaling | None:
        """Centring and scaling estimated on the first full buffer; None if not asked for.

        On several ranks it is estimated on all their buffers, so all have to ask for it. Of several
        hooks each has its own, see `at`.
        """
        return self.scalings.get(self.hook_names[0]) if len(self.hook_names) == 1 else None

    @property
    def scalings(self) -> dict[str, Scaling]:
        """`scaling` of each hook; none if not asked for."""
        if not self._scalings and self.buffer is not None and (self.center or self.scale):
            rows = self.buffer.fill() if self.buffer.rows is None else self.buffer.rows
            mean_of_ranks = partial(self.of_all_ranks, operation="mean")
            parts = self.by_hook(rows)
            parts = parts if isinstance(parts, dict) else {self.hook_names[0]: parts}
            self._scalings = {
                name: estimate_scaling(part, self.center, self.scale, mean_of_ranks)
                for name, part in parts.items()
            }
        return self._scalings

    def of_all_ranks(self, value: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
        """The mean or the sum of a tensor on the CPU over all ranks; on one, the tensor itself."""
        if self.n_ranks == 1:
            return value
        strategy = self.trainer.strategy  # type: ignore[union-attr]
        found = strategy.reduce(value.to(strategy.root_device, copy=True), reduce_op=operation)
        return found.cpu()

    @property
    def n_ranks(self) -> int:
        """Processes that share the text."""
        return self._place()[1]

    def _place(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
