"""The initial dictionary of an SAE: random directions, one for each latent."""

from collections.abc import Mapping

import torch
from torch import nn

from lightning_sae.distributed.undrawn import Undrawn, as_parameters
from lightning_sae.functional.directions import RandomUnitRows
from lightning_sae.functional.geometry import random_unit_rows

LARGE = 2**28  # entries of a dictionary, 1 GiB in float32, from which on it is drawn when needed


def create_directions(
    module: nn.Module, rows: int, d: int, axes: Mapping[str, int], norm: float
) -> None:
    """Register parameters that all hold the same random rows of one norm.

    A large dictionary gets its values when it is used, because only a part of it may be, see
    `lightning_sae.distributed.undrawn`. They are the same values.

    Args:
        module: The module.
        rows: Number of latents.
        d: Width.
        axes: The axis of the latents, by name of the parameter.
        norm: The norm of each row.
    """
    if rows * d < LARGE or torch.get_default_device().type != "cpu":
        directions = random_unit_rows(rows, d).mul_(norm)
        for name, parameter in as_parameters(directions, axes).items():
            module.register_parameter(name, parameter)
        return
    later = RandomUnitRows(rows, d)

    def draw(latents: range) -> torch.Tensor:
        return later.draw(latents).mul_(norm)

    module._parameters = Undrawn(module._parameters, axes, later.shape, draw)
