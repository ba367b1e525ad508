"""Lazy initialisation of a large dictionary, so that a device initialises only its own part.

An SAE is built before it is known which part of it a process will hold. So the weights of a large
dictionary are initialised on first access: `keep_own_part` initialises the part of this device,
any other access the whole dictionary. The values are the same, bit for bit, as with eager
initialisation.
"""

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Undrawn(dict[str, nn.Parameter | None]):
    """The parameters of a module, some of which are initialised on first access.

    It takes the place of `Module._parameters`, through which torch's modules reach all parameters.

    Args:
        given: Parameters with values.
        axes: Names of the others, with the axis of the latents of each.
        shape: Number of latents, and entries of each.
        draw: The rows of these latents. All of the other parameters have these entries.
    """

    def __init__(
        self,
        given: Mapping[str, nn.Parameter | None],
        axes: Mapping[str, int],
        shape: tuple[int, int],
        draw: Callable[[range], Tensor],
    ) -> None:
        super().__init__(given)
        self._axes = dict(axes)
        self._draw = draw
        self._n, self._d = shape
        self._shown = False
        rows = torch.empty(shape, device="meta")
        for name, parameter in as_parameters(rows, axes).items():
            super().__setitem__(name, parameter)

    def draw(self, latents: range) -> set[str]:
        """Initialise the pending parameters for some latents only, and return their names."""
        axes, self._axes = self._axes, {}
        if axes:
            for name, parameter in as_parameters(self._draw(latents), axes).items():
                stand_in = super().__getitem__(name)
                assert stand_in is not None
                parameter.requires_grad = stand_in.requires_grad
                super().__setitem__(name, parameter)
        return {*axes}

    def leave(self) -> None:
        """Allocate the pending parameters without initialising them."""
        d = self._d
        self._draw = lambda latents: torch.empty(len(latents), d)
        self.draw(range(self._n))

    @contextmanager
    def shown_without_values(self) -> Iterator[None]:
        """In this block pending parameters are `meta` tensors; access does not draw them."""
        self._shown = True
        try:
            yield
        finally:
            self._shown = False

    def _need(self, name: str | None = None) -> None:
        if not self._shown and (name is None or name in self._axes):
            self.draw(range(self._n))

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self._need(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:  # without which `dict(self)` would not ask for values
        return super().__iter__()

    def copy(self) -> dict[str, nn.Parameter | None]:
        """All parameters with their names, in a plain dictionary."""
        return dict(self.items())

    def get(self, name: str, default: Any = None) -> Any:
        """The parameter of a name."""
        self._need(name)
        return super().get(name, default)

    def items(self) -> ItemsView[str, nn.Parameter | None]:  # type: ignore[override]
        """All parameters with their names."""
        self._need()
        return super().items()

    def values(self) -> ValuesView[nn.Parameter | None]:  # type: ignore[override]
        """All parameters."""
        self._need()
        return super().values()

    def __setitem__(self, name: str, parameter: nn.Parameter | None) -> None:
        self._axes.pop(name, None)
        super().__setitem__(name, parameter)

    def __delitem__(self, name: str) -> None:
        self._axes.pop(name, None)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        """Remove the parameter of a name and return it."""
        self._need(name)
        return super().pop(name, *default)

    def __reduce__(self) -> Any:
        """Pickle and copy as a plain dictionary of initialised parameters."""
        return dict, (self.copy(),)


def as_parameters(rows: Tensor, axes: Mapping[str, int]) -> dict[str, nn.Parameter]:
    """Parameters with the same entries: rows, or where the axis of the latents is 1, columns.

    All are stored with one latent after another.
    """
    of_own = [rows.clone() for _ in range(len(axes) - 1)] + [rows]
    return {
        name: nn.Parameter(values.T if axis else values)
        for (name, axis), values in zip(axes.items(), of_own, strict=True)
    }


@contextmanager
def without_drawing(module: nn.Module) -> Iterator[None]:
    """In this block parameters that are not initialised yet are `meta` tensors."""
    parameters = vars(module)["_parameters"]
    if not isinstance(parameters, Undrawn):
        yield
        return
    with parameters.shown_without_values():
        yield


def drawn_for(module: nn.Module, latents: range) -> set[str]:
    """Initialise the pending parameters for some latents only, and return their names."""
    parameters = vars(module)["_parameters"]
    return parameters.draw(latents) if isinstance(parameters, Undrawn) else set()


def leave_undrawn(module: nn.Module) -> None:
    """Allocate pending parameters without initialising them, for a module about to be loaded."""
    parameters = vars(module)["_parameters"]
    if isinstance(parameters, Undrawn):
        parameters.leave()
