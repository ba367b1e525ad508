"""A list of values for one argument: one description becomes several members."""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

Description = dict[str, Any]


def expanded(descriptions: Iterable[Mapping[str, Any]]) -> list[Description]:
    """Descriptions without sweeps: for each that has some, one for each combination of values.

    A sweep names `seed`, `hook_name` or an argument of the SAE, and lists its values, which become
    part of the members' names.

    Raises:
        ValueError: If a sweep is not a mapping of names to lists of values.

    Example:
        >>> sae = {"class_path": "ReLUSAE", "init_args": {"d_sae": 64}}
        >>> sweep = {"l1_coefficient": [1, 2], "seed": [0]}
        >>> for member in expanded([{"name": "relu", "sae": sae, "sweep": sweep}]):
        ...     print(member["name"], member["seed"], member["sae"]["init_args"])
        relu-l1_coefficient=1-seed=0 0 {'d_sae': 64, 'l1_coefficient': 1}
        relu-l1_coefficient=2-seed=0 0 {'d_sae': 64, 'l1_coefficient': 2}
    """
    return [member for description in descriptions for member in _members_of(description)]


def _members_of(description: Mapping[str, Any]) -> list[Description]:
    rest = {key: value for key, value in description.items() if key != "sweep"}
    sweep = description.get("sweep") or {}
    _require_lists(rest.get("name"), sweep)
    return [
        _with_values(rest, dict(zip(sweep, values, strict=True)))
        for values in product(*sweep.values())
    ]


def _require_lists(name: Any, sweep: Any) -> None:
    found = sweep.values() if isinstance(sweep, Mapping) else [sweep]
    if not all(isinstance(values, list | tuple) and values for values in found):
        raise ValueError(
            f"Member `{name}`: Expected `sweep` to give a list of values for each argument, as in "
            f"`l1_coefficient: [1.0, 2.0]`, but got {sweep}."
        )


def _with_values(rest: Description, values: Mapping[str, Any]) -> Description:
    member = dict(rest)
    own = {key: value for key, value in values.items() if key in ("seed", "hook_name")}
    arguments = {key: value for key, value in values.items() if key not in own}
    if arguments:
        sae = rest.get("sae")
        if not isinstance(sae, Mapping):
            raise ValueError(
                f"Member `{rest.get('name')}`: Expected `sae` to be a `class_path` with "
                f"`init_args`, of which `sweep` varies {sorted(arguments)}, but got "
                f"{type(sae).__name__}."
            )
        member["sae"] = {**sae, "init_args": {**(sae.get("init_args") or {}), **arguments}}
    labels = [f"{key}={_label(value)}" for key, value in values.items()]
    return {**member, **own, "name": "-".join([str(rest.get("name")), *labels])}


def _label(value: Any) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")
