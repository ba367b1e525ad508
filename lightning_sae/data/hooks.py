"""Where in a model a TransformerLens hook name lies, as a module and a side of it.

The common hooks are sites of the plain `transformers` model, so the language model runs at its own
speed, with its own attention kernels. All others are hook points of TransformerLens' wrapper.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

Edit = Callable[[Float[Tensor, "batch seq d"]], Float[Tensor, "batch seq d"]]

ATTENTION = ("self_attn", "attention", "attn")
ATTENTION_OUT = ("o_proj", "dense", "c_proj", "out_proj")
MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out")
# Blocks that normalise again after the MLP: there `hook_mlp_out` is not the MLP's own output.
POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")


class Site(NamedTuple):
    """A place in a model: what goes into or comes out of a module.

    Attributes:
        module: The module.
        side: `input` for its first argument, `output` for its (first) result.
    """

    module: nn.Module
    side: Literal["input", "output"]


@contextmanager
def edited(site: Site, edit: Edit) -> Iterator[None]:
    """Replace the activation at `site` by `edit(activation)` in every forward pass inside.

    An activation with more than three axes (heads) is given as [batch, seq, d] and put back.
    """
    if site.side == "input":
        handle = site.module.register_forward_pre_hook(
            lambda _, args: (_edit(args[0], edit), *args[1:])
        )
    else:
        handle = site.module.register_forward_hook(
            lambda _module, _args, output: _edit_first(output, edit)
        )
    try:
        yield
    finally:
        handle.remove()


def _edit(activation: Tensor, edit: Edit) -> Tensor:
    return edit(activation.flatten(2)).view_as(activation)


def _edit_first(output: Any, edit: Edit) -> Any:
    if isinstance(output, tuple):
        return (_edit(output[0], edit), *output[1:])
    return _edit(output, edit)


def native_site(model: nn.Module, hook_name: str) -> Site | None:
    """The site of a `transformers` model that TransformerLens calls `hook_name`, where simple.

    Returns:
        The site, or None if only TransformerLens itself knows where the hook lies.

    Raises:
        ValueError: If the layer is out of range.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    layers = _layers(model)
    if match is None or layers is None:
        return None
    layer, hook = int(match[1]), match[2]
    if layer >= len(layers):
        raise ValueError(
            f"Expected argument `hook_name` to name a layer from 0 to {len(layers) - 1} but got "
            f"`{hook_name}`: the model has {len(layers)} layers."
        )
    return _site_in_block(layers[layer], hook)


def _site_in_block(block: nn.Module, hook: str) -> Site | None:
    attention, mlp = _first(block, ATTENTION), _first(block, ("mlp",))
    plain = _first(block, POST_NORMS) is None
    places = {
        "hook_resid_pre": (block, "input"),
        "hook_resid_post": (block, "output"),
        "hook_attn_out": (attention if plain else None, "output"),
        "hook_mlp_out": (mlp if plain else None, "output"),
        "attn.hook_z": (_first(attention, ATTENTION_OUT), "input"),
        "mlp.hook_post": (_first(mlp, MLP_OUT), "input"),
    }
    module, side = places.get(hook, (None, "output"))
    return None if module is None else Site(module, side)  # type: ignore[arg-type]


def _layers(model: Any) -> nn.ModuleList | None:
    """The stack of blocks: the one module list as long as the configuration says."""
    n_layers = model.config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return stacks[0] if len(stacks) == 1 else None


def _first(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children()) if module is not None else {}
    return next((children[name] for name in names if name in children), None)


def lens_site(model: Any, hook_name: str) -> Site:
    """The hook point called `hook_name` of a TransformerBridge or HookedTransformer.

    Raises:
        ValueError: If there is none; the message lists names that are close.
    """
    if hook_name in model.hook_dict:
        return Site(model.hook_dict[hook_name], "output")
    close = difflib.get_close_matches(hook_name, model.hook_dict, n=5, cutoff=0.4)
    raise ValueError(
        f"Expected argument `hook_name` to be a hook of the model but got `{hook_name}`; "
        f"close ones are: {', '.join(close) or 'none'}. Its layers are 0 to "
        f"{model.cfg.n_layers - 1}."
    )
