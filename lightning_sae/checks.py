"""Checks of arguments: each error says what was expected, what came and the remedy."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_sae.files import UNFINISHED

_NOTED: ContextVar[list[str] | None] = ContextVar("noted", default=None)


def refuse(message: str) -> None:
    """Raise a ValueError about an argument, or note it inside `all_at_once`."""
    noted = _NOTED.get()
    if noted is None:
        raise ValueError(message)
    if message not in noted:
        noted.append(message)


def is_noted() -> bool:
    """Whether something was noted inside `all_at_once`."""
    return bool(_NOTED.get())


@contextmanager
def all_at_once() -> Iterator[None]:
    """Note all bad arguments inside, and raise one ValueError with a line for each.

    If something else fails after the first of them, it is taken for its consequence and not shown,
    unless it is about an argument too.
    """
    noted: list[str] = []
    token = _NOTED.set(noted)
    try:
        yield
    except Exception as error:
        if not noted:
            raise
        last = str(of_ours(error))
        named = last.startswith(("Expected argument", "Member `"))
        noted += [last] if named and last not in noted else []
    finally:
        _NOTED.reset(token)
    if noted:
        raise ValueError("\n".join(noted))


def of_ours(error: Exception) -> Exception:
    """The original error, if jsonargparse has wrapped it in one that shows all arguments."""
    while isinstance(error.__cause__, ValueError) and "Given value" in str(error):
        if chosen := _of_subtypes(str(error)):
            return ValueError(chosen)
        error = error.__cause__
    return error


def _of_subtypes(message: str) -> str | None:
    """Of the errors that jsonargparse lists for the types of a union, the one about an argument.

    The cause of such an error is that of the first type, which may be another than was meant.
    """
    listed = message.partition("\nErrors:\n  - ")[2].partition("\nGiven value")[0]
    errors = [each.replace("\n    ", "\n") for each in listed.split("\n  - ")]
    return next((e for e in errors if e.startswith(("Expected argument", "Member `"))), None)


def require_positive(**values: int | float) -> None:
    """Raise a ValueError if an argument is not positive."""
    for name, value in values.items():
        if not value > 0:  # nor not a number
            refuse(f"Expected argument `{name}` to be positive but got {value}.")


def require_integers(**values: Any) -> None:
    """Raise a ValueError if an argument is not an integer; True and False are refused."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            refuse(f"Expected argument `{name}` to be a whole number but got {value!r}.")


def require_not_negative(**values: int | float) -> None:
    """Raise a ValueError if an argument is negative."""
    require_at_least(0, **values)


def require_at_least(least: float, **values: int | float | None) -> None:
    """Raise a ValueError if an argument is below `least`; None, a default, is accepted."""
    for name, value in values.items():
        if value is not None and not value >= least:
            refuse(f"Expected argument `{name}` to be at least {least} but got {value}.")


def require_between(least: float, most: float, **values: float | Tensor) -> None:
    """Raise a ValueError if a number is not finite or out of bounds."""
    for name, value in values.items():
        numbers = torch.as_tensor(value)
        wrong = numbers[~((numbers >= least) & (numbers <= most) & numbers.isfinite())]
        if len(wrong):
            refuse(
                f"Expected argument `{name}` to be from {least} to {most} but got "
                f"{wrong[0].item():g}."
            )


def require_k(k: Any, d_sae: int) -> None:
    """Raise a ValueError unless 0 < `k` <= `d_sae`."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= d_sae:
        refuse(f"Expected argument `k` to be above 0 and at most `d_sae`={d_sae} but got {k!r}.")


def require_one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raise a ValueError if an argument is not one of the allowed words."""
    for name, value in values.items():
        if value not in allowed:
            refuse(f"Expected argument `{name}` to be one of {allowed} but got {value!r}.")


def require_types(kind: type, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if arguments do not match the annotations of a class and its bases.

    For arguments read from a file: plain values, and tuples of them.
    """
    for name, value in arguments.items():
        for base in kind.__mro__:
            parameters = inspect.signature(base).parameters if "__init__" in vars(base) else {}
            if name in parameters:
                expected = parameters[name].annotation
                expect(_is_of(value, expected), name, f"of type {expected}", repr(value))
                break


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type; always true for types that are not plain."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list, Sequence):
        if not isinstance(value, tuple | list):
            return False
        fixed = origin is tuple and Ellipsis not in parts
        each = parts if fixed else parts[:1] * len(value)
        return len(value) == len(each) and all(map(_is_of, value, each))
    if kind in (bool, str, NoneType):
        return isinstance(value, kind)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind is float or float(value).is_integer())
    return True


def require_betas(betas: Any) -> None:
    """Raise a ValueError unless `betas` are two numbers of at least 0 and below 1."""
    numbers = isinstance(betas, tuple | list) and len(betas) == 2
    if not numbers or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
        refuse(
            "Expected argument `betas` to be two numbers of at least 0 and below 1 but got "
            f"{betas!r}."
        )


def refuse_second(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError if the trainer has another callback of the class of `callback`."""
    kind = type(callback)
    if sum(isinstance(other, kind) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected one `{kind.__name__}` but the trainer has several: remove all but one."
        )


def require_new_folder(name: str, folder: Path) -> None:
    """Raise a ValueError about the argument `name` if a folder holds files, or cannot be made."""
    files = [folder] if folder.is_file() else folder.glob("*")
    holds = any(not path.name.startswith(UNFINISHED) for path in files)
    expect(not holds, name, "a new or empty folder", f"{folder}, which holds files: choose another")
    above = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    expect(
        above.is_dir() and os.access(above, os.W_OK),
        name,
        "a folder that can be made",
        f"{folder}, for {above} is no folder that can be written to: choose another",
    )


def expect(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError about the argument `name` unless `holds`."""
    if not holds:
        refuse(f"Expected argument `{name}` to be {expected} but got {value}.")
