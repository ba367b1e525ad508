"""Groups of SAEs that share one pass over the text, and the settings in which groups differ."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lightning_sae.analysis.analyze import TAKEN_OVER
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule

NAMED = ("model", "hook_name", "text")
"""Settings that are told by their values alone."""
SHARED = tuple(dict.fromkeys([*NAMED, "model_revision", *TAKEN_OVER]))
"""Settings of the activations, shared by SAEs that are evaluated in one pass over the text."""

Place = list[str]
"""What tells a pass from the others, such as its model and hook; empty if there is only one."""


def grouped(
    saes: Mapping[str, SparseAutoencoder], given: Mapping[str, Any]
) -> tuple[list[dict[str, SparseAutoencoder]], list[Place]]:
    """SAEs by the settings of their activations, apart from settings given for all.

    Args:
        saes: SAEs by name.
        given: Settings given for all.

    Returns:
        The groups, and the place of each.
    """
    groups: dict[str, dict[str, SparseAutoencoder]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, sae in saes.items():
        own = _settings(sae, given)
        groups.setdefault(repr(own), {})[name] = sae
        settings[repr(own)] = own
    return list(groups.values()), places_of(list(settings.values()))


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ActivationDataModule).parameters.items()
}


def _settings(sae: SparseAutoencoder, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an SAE's activations; those that it does not name have their defaults."""
    own = {key: sae.source.get(key, DEFAULTS.get(key)) for key in SHARED} | dict(given)
    if "model" in given:
        own["model_revision"] = None
    # For `auto`, the source also states the choice: "auto (bos before texts)".
    return {k: "auto" if str(v).startswith("auto (") else v for k, v in own.items()}


def places_of(settings: Sequence[Mapping[str, Any]]) -> list[Place]:
    """What tells some settings apart, in words: no more than needed, beginning with the model.

    Example:
        >>> places_of([{"model": "a/gpt", "hook_name": "x"}, {"model": "a/gpt", "hook_name": "y"}])
        [['x'], ['y']]
        >>> places_of([{"model": "a/gpt", "pack": True}, {"model": "a/gpt", "pack": False}])
        [[], ['pack=False']]
        >>> places_of([{"model": "a/gpt", "pack": True}, {"model": "b/llama", "pack": False}])
        [['gpt'], ['llama']]
    """
    needed: list[str] = []
    for key in settings[0]:
        if _n_different(settings, [*needed, key]) > _n_different(settings, needed):
            needed.append(key)
    return [
        [
            _word(key, own[key], [each[key] for each in settings])
            for key in needed
            if key in NAMED or own[key] != DEFAULTS.get(key)
        ]
        for own in settings
    ]


def _n_different(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({repr([own[key] for key in keys]) for own in settings})


def _word(key: str, value: Any, among: Sequence[Any]) -> str:
    if key == "hook_name":
        return str(value)
    if key not in NAMED:
        return f"{key}={value}"
    # The last parts of paths, if they tell them apart.
    short = {repr(each): ", ".join(PurePath(v).name for v in _listed(each)) for each in among}
    return short[repr(value)] if len(set(short.values())) == len(short) else str(value)


def _listed(value: Any) -> list[str]:
    return [str(each) for each in (value if isinstance(value, list | tuple) else [value])]


def labelled(name: str, place: Place, mark: str = "") -> str:
    """A name with what it does not say of its place.

    Example:
        >>> labelled("topk", ["gpt", "blocks.2.hook_resid_post"], "`")
        'topk, `gpt`, `blocks.2.hook_resid_post`'
        >>> labelled("topk-hook_name=blocks.2.hook_resid_post", ["blocks.2.hook_resid_post"])
        'topk-hook_name=blocks.2.hook_resid_post'
    """
    return ", ".join([name, *(f"{mark}{part}{mark}" for part in place if part not in name)])
