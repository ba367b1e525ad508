"""Makes members, with their SAEs and callbacks, from descriptions as in YAML."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import Callback

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import all_at_once
from lightning_sae.side_by_side.member import Member
from lightning_sae.side_by_side.sweeps import expanded

T = TypeVar("T")

KEYS = {"name", "sae", "hook_name", "seed", "callbacks", "sweep"}

Widths = int | Mapping[str, int] | None


def build_members(descriptions: Sequence[Mapping[str, Any]], d_in: Widths) -> list[Member]:
    """The members of descriptions and their sweeps; see `SideBySide`.

    Raises:
        ValueError: If a description does not fit, two members share a name or a part, or there
            are none; the message says which.
    """
    plain = [_plain(description) for description in descriptions]
    for description in plain:
        _require_keys(description)
    every = expanded(plain)
    _require_names([str(description["name"]) for description in every])
    members = [_build(description, d_in) for description in every]
    _require_parts_of_their_own(members)
    return members


def _plain(value: Any) -> Any:
    """A description as plain dictionaries and lists; the command line gives namespaces."""
    if isinstance(value, Namespace | Mapping):
        items = vars(value) if isinstance(value, Namespace) else value
        return {key: _plain(part) for key, part in items.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _require_keys(description: Mapping[str, Any]) -> None:
    unknown, missing = description.keys() - KEYS, {"name", "sae"} - description.keys()
    if unknown or missing:
        raise ValueError(
            f"Member `{description.get('name')}`: Expected `name` and `sae`, and maybe "
            f"{', '.join(sorted(KEYS - {'name', 'sae'}))}, but {sorted(missing)} are missing and "
            f"{sorted(unknown)} unknown."
        )


def _require_names(names: list[str]) -> None:
    if not names:
        raise ValueError("Expected argument `members` to have at least one member but got none.")
    for name in names:
        if not re.fullmatch(r"\w[\w.,=+-]*", name):
            raise ValueError(
                "Expected the `name` of a member, which is also the name of its folder, to have "
                f"only letters, digits and _ - . , = + but got `{name}`."
            )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(
            f"Expected members to have different values of `name` but several are called "
            f"{', '.join(f'`{name}`' for name in twice)}: rename all but one."
        )


def _require_parts_of_their_own(members: list[Member]) -> None:
    owner: dict[int, str] = {}
    for member in members:
        for part in (member.sae, *member.callbacks):
            other = owner.setdefault(id(part), member.name)
            if other != member.name:
                raise ValueError(
                    f"Members `{other}` and `{member.name}` share one {type(part).__name__}: give "
                    "each its own."
                )


def _build(description: Mapping[str, Any], d_in: Widths) -> Member:
    name, hook_name = str(description["name"]), description.get("hook_name")
    seed = description.get("seed")
    with named(name):
        sae, callbacks = description["sae"], description.get("callbacks") or []
        if not isinstance(sae, SparseAutoencoder):
            width = _width(hook_name, d_in)
            sae = _sae(sae, width, seed)
        return Member(name, sae, [_callback(each) for each in callbacks], hook_name, seed)


def _width(hook_name: str | None, d_in: Widths) -> int | None:
    if not isinstance(d_in, Mapping):
        return d_in
    if hook_name is None or hook_name not in d_in:
        raise ValueError(
            f"Expected `hook_name` to be one of the data's, {', '.join(d_in)}, but got "
            f"{hook_name}: correct it, or add it to `data.hook_name`."
        )
    return d_in[hook_name]


def _sae(description: Any, width: int | None, seed: int | None) -> SparseAutoencoder:
    """An SAE with the weights that it would get in a run of its own with this seed."""
    if isinstance(description, Mapping) and width is not None:
        arguments = dict(description.get("init_args") or {})
        arguments["d_in"] = arguments.get("d_in") or width
        description = {**description, "init_args": arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() if seed is None else seed)
        return _instantiated(SparseAutoencoder, description)  # type: ignore[type-abstract]


def _callback(description: Any) -> Callback:
    if isinstance(description, Callback):
        return description
    return _instantiated(Callback, description)


def _instantiated(kind: type[T], description: Any) -> T:
    """An object from its `class_path` and `init_args`, types checked as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    parsed = parser.parse_object({"part": description})
    # In a context of its own: the command line leaves `SideBySide`'s arguments in the present one,
    # and Lightning would take them for the hyper-parameters of what is built here.
    return Context().run(_checked, parser, parsed)


def _checked(parser: ArgumentParser, parsed: Namespace) -> Any:
    with all_at_once():
        return parser.instantiate_classes(parsed).part


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say which member an error is about."""
    try:
        yield
    except (ValueError, ArgumentError) as error:
        raise ValueError(f"Member `{name}`: {error}") from error
