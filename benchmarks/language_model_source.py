"""Which language model and text activations come from, and the settings of runs on them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

L1_COEFFICIENT = 2.0  # on activations scaled to a mean norm of sqrt(d_in)
LR = 1e-3


class Source(NamedTuple):
    """A language model, a text, and how the text is read.

    Attributes:
        model: A `transformers` folder, or `embedded`.
        text: A text file, or `embedded`.
        layer: Index of the layer whose output is read.
        batch_size: Activations in a batch.
        context_length: Tokens in a block.
        blocks_per_pass: Blocks in a forward pass.
        buffer_size: Activations in the shuffling buffer.
    """

    model: str = "embedded"
    text: str = "embedded"
    layer: int = 2
    batch_size: int = 2048
    context_length: int = 128
    blocks_per_pass: int = 32
    buffer_size: int = 65536


def layer_of(hook_name: str) -> int:
    """The N of `blocks.N.hook_resid_post`.

    Raises:
        ValueError: If the hook has another form.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_name)
    if match is None:
        raise ValueError(
            f"Expected `--hook` to be blocks.N.hook_resid_post but got {hook_name}: of a local "
            "folder SAELens reads the outputs of whole layers."
        )
    return int(match[1])


def layer_name(network: Any, layer: int) -> str:
    """Path of a layer in a `transformers` model."""
    n = network.config.num_hidden_layers
    lists = (k for k, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    return f"{next(lists)}.{layer}"


def absolute(path: str) -> str:
    """Make a path absolute; `embedded` is returned unchanged.

    Raises:
        ValueError: If the path does not exist.
    """
    if path != "embedded" and not Path(path).expanduser().exists():
        raise ValueError(f"Expected a file or folder, or `embedded`, but there is no {path}.")
    return path if path == "embedded" else str(Path(path).expanduser().resolve())
