"""Stored activations as a source of an SAE: their rows, and where they come from."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_sae.data.cache.description import SCALED_ON, probe, require_same_model
from lightning_sae.data.cache.foreign import open_foreign
from lightning_sae.data.cache.manifest import SPLITS, Manifest, Split
from lightning_sae.data.cache.rows import ByHook
from lightning_sae.data.cache.rows import Rows as CachedRows
from lightning_sae.data.cache.shards import open_rows
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.load_model import LoadedModel
from lightning_sae.data.loaders import Rows
from lightning_sae.data.scaling import Scaling, estimate_scaling
from lightning_sae.data.source import ActivationSource
from lightning_sae.data.text import Text
from lightning_sae.distributed.split import copies_of

log = logging.getLogger("lightning.pytorch")

Activations = str | Path | Sequence[str | Path] | Mapping[str, Any] | Tensor | np.ndarray
S = TypeVar("S", bound="StoredActivations")

OPEN = ("_rows", "_at_each", "_text_data")
"""Attributes that hold files or models, which copies leave out."""


class StoredActivations(ActivationSource, ABC):
    """Base class of `CachedDataModule`: which rows it has, and what is known of them.

    Attributes:
        folder: The cache; None for other activations.
        manifest: Its manifest; None for other activations.
    """

    activations: Activations
    folder: Path | None
    manifest: Manifest | None
    validation_fraction: float
    center: bool
    scale: bool
    n_validation: int
    n_test: int
    evaluation_model: str | Path | LoadedModel | None
    evaluation_text: Text | None
    _names: list[str]
    _whole: "StoredActivations | None"

    @abstractmethod
    def train_dataloader(self) -> Iterable[Rows]:
        """Batches of the training rows."""

    def rows(self, split: Split) -> CachedRows:
        """All training rows, or all held-out rows."""
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[Split, CachedRows]:
        if self.manifest is not None and self.folder is not None:
            folder, manifest = self.folder, self.manifest
            return {s: open_rows(folder, manifest, s).only(self._names) for s in SPLITS}
        rows = open_foreign(self.activations, self._names)
        n = len(rows) - round(self.validation_fraction * len(rows))
        return {"training": rows.between(0, n), "held_out": rows.between(n, len(rows))}

    def by_hook(self, rows: ByHook) -> Rows:
        """Rows in the form of a batch: a tensor, or a dictionary of tensors by hook."""
        return rows if len(rows) > 1 else next(iter(rows.values()))

    @override
    def at(self: S, hook_name: str) -> S:
        """The same data with only one of its hooks."""
        if len(self.hook_names) <= 1:
            return self
        one = type(self).__new__(type(self))
        vars(one).update(vars(self))
        one.hook_names = one._names = [hook_name]
        one.d_in, one._whole = self.d_in[hook_name], self
        vars(one).pop("_text_data", None)
        vars(one).update(_rows=self._at_each[hook_name])
        return one

    @cached_property
    def _at_each(self) -> dict[str, dict[Split, CachedRows]]:
        return {
            name: {split: rows.only([name]) for split, rows in self._rows.items()}
            for name in self.hook_names
        }

    def place(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks; those of a split dictionary are one."""
        if self.trainer is None:
            return 0, 1
        return copies_of(self.trainer)[:2]

    @property
    @override
    def source(self) -> dict[str, Any]:
        """Where the activations come from, as plain values that are saved with an SAE."""
        names = self.hook_names
        hooks = {"hook_name": names[0] if len(names) == 1 else [*names]} if names else {}
        if self.manifest is not None:
            return {**self.manifest.source, **hooks, "cache": self.manifest.digest()}
        given = self.activations
        named = isinstance(given, str | Path) or (
            isinstance(given, list | tuple) and all(isinstance(each, str | Path) for each in given)
        )
        listed = [given] if isinstance(given, str | Path) else given
        where = [str(each) for each in listed] if named else f"a Python {type(given).__name__}"
        own = {"model": self.evaluation_model, "text": self.evaluation_text}
        plain = {name: str(v) for name, v in own.items() if isinstance(v, str | Path)}
        return {"activations": where, **hooks, **plain}

    @override
    def scaling(self) -> Scaling | None:
        """Mean and scale of the activations, over all rows of a cache.

        For other activations they are estimated from evenly spaced rows. None if neither is asked
        for, or with several hooks.
        """
        name, *others = self.rows("training").widths
        if others or not (self.center or self.scale):
            return None
        if self.manifest is None:
            return estimate_scaling(self._spread(SCALED_ON)[name], self.center, self.scale)
        found = self.manifest.statistics[name]
        mean = torch.tensor(found["mean"])
        scale = found["centered_scale" if self.center else "scale"] if self.scale else 1.0
        return Scaling(mean if self.center else torch.zeros_like(mean), torch.tensor(scale))

    def _spread(self, n: int) -> ByHook:
        """Evenly spaced training rows."""
        rows = self.rows("training")
        return rows.take(torch.linspace(0, len(rows) - 1, min(n, len(rows))).long())

    @override
    def text_data(self) -> ActivationDataModule | None:
        """The same activations read from text by their model, which is loaded here.

        Returns None with a warning if model or text cannot be opened.

        Raises:
            ValueError: If the model is not the cache's, or a given model or text cannot be opened.
        """
        if self._text_data is not None and self.trainer is not None:
            self._text_data.trainer = self.trainer
            self._text_data.language_model.to(self.trainer.strategy.root_device)
        return self._text_data

    @cached_property
    def _text_data(self) -> ActivationDataModule | None:
        if self._whole is not None:
            of_all = self._whole.text_data()
            return None if of_all is None else of_all.at(self.hook_names[0])
        given = {"model": self.evaluation_model, "text": self.evaluation_text}
        own = {name: value for name, value in given.items() if value is not None}
        noted = {} if self.manifest is None else self.manifest.data
        known = {**{k: v for k, v in noted.items() if v is not None}, **own}
        names = self.hook_names
        if not names or "model" not in known or "text" not in known:
            return None
        if isinstance(known.get("positions"), list):
            known["positions"] = tuple(known["positions"])
        known["hook_name"] = names[0] if len(names) == 1 else [*names]
        data = ActivationDataModule(**known, n_validation=self.n_validation, n_test=self.n_test)
        try:
            identity = data.language_model.identity
            _ = data.held_out_corpus
        except (ValueError, OSError) as error:
            if own:
                raise
            log.warning(
                "Metrics that need the language model are left out: what the cache names cannot be "
                "opened: %s Give `evaluation_model` and `evaluation_text`, as they are now.",
                error,
            )
            return None
        if self.manifest is not None:
            require_same_model(
                self.manifest.probe, probe(data), identity["model_dtype"], identity["model"]
            )
        return data

    @override
    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or another process: all but the trainer and open files or models."""
        return {name: value for name, value in super().__getstate__().items() if name not in OPEN}
