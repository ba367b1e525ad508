"""Ranks of one run have one configuration."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer


def require_agreement(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError on all ranks unless all have the same settings.

    Args:
        trainer: Says how many ranks there are; with one there is nothing to compare.
        settings: Plain values by name, nested or not.
    """
    if trainer.world_size == 1:
        return
    of_all: list[dict[str, str]] = [{}] * trainer.world_size
    torch.distributed.all_gather_object(of_all, flat(settings))
    names = sorted({name for settings in of_all for name in settings})
    differing = [name for name in names if len({own.get(name) for own in of_all}) > 1]
    if differing:
        values = (", ".join(f"{own.get(name)}" for own in of_all) for name in differing)
        pairs = "; ".join(f"`{name}`: {each}" for name, each in zip(differing, values, strict=True))
        raise ValueError(
            "Expected all ranks to have one configuration but, from rank 0 on, they have "
            f"{pairs}. Start them all with the same arguments and files."
        )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by their dotted names, as text.

    Parts of a list are counted, or called by the name that they have.

    Example:
        >>> flat({"model": {"d_sae": 8, "betas": (0.9, 0.99)}, "seed": None})
        {'model.d_sae': '8', 'model.betas': '(0.9, 0.99)', 'seed': 'None'}
        >>> flat({"members": [{"name": "relu", "lr": 0.1}], "callbacks": [{"n_steps": 5}]})
        {'members.relu.name': 'relu', 'members.relu.lr': '0.1', 'callbacks.0.n_steps': '5'}
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
            value = {str(part.get("name", i)): part for i, part in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            # Without addresses, for these belong to a process.
            found[f"{prefix}{name}"] = re.sub(" at 0x[0-9a-f]+", "", str(value))
    return found
