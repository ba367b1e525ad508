"""Where the activations of a language model come from."""

import re
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A model, a text and how it is read.

    Attributes:
        model: A `transformers` folder, or `embedded`.
        text: A text file, or `embedded`.
        layer: The layer behind which the residual stream is read.
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
    """The layer of `blocks.N.hook_resid_post`.

    Raises:
        ValueError: If it is another hook.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_name)
    if match is None:
        raise ValueError(
            f"Expected `--hook` to be blocks.N.hook_resid_post but got {hook_name}: of a local "
            "folder SAELens reads the outputs of whole layers."
        )
    return int(match[1])


def absolute(path: str) -> str:
    """A path that holds in another folder too; `embedded` stays as it is.

    Raises:
        ValueError: If nothing is there.
    """
    if path != "embedded" and not Path(path).expanduser().exists():
        raise ValueError(f"Expected a file or folder, or `embedded`, but there is no {path}.")
    return path if path == "embedded" else str(Path(path).expanduser().resolve())
