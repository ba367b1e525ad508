"""Resolve a hook's name to a place in a model: a module and its input or output.

A name may be the path of a module (`model.layers.3.mlp`, or `model.layers.3.mlp:in`), or
the name of a TransformerLens hook. Common TransformerLens hooks are mapped to modules of the plain
`transformers` model, which runs at full speed with its own attention kernels. All others are hook
points of TransformerLens' wrapper. `data/trial.py` checks that a site is what its name says.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

Edit = Callable[[Float[Tensor, "batch seq d"]], Float[Tensor, "batch seq d"]]

ATTENTION = ("self_attn", "attention", "attn", "self_attention")
ATTENTION_OUT = ("o_proj", "dense", "c_proj", "out_proj", "wo")
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
# Norms after attention or MLP: where a block has them, it adds their output to the stream.
AFTER_ATTENTION = ("post_attention_layernorm", "post_self_attn_layernorm")
AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")


class Reached(Exception):
    """Ends a forward pass at the hook, so that later layers are not computed."""


class Site(NamedTuple):
    """A place in a model: the input or output of a module.

    Attributes:
        module: The module.
        side: `input` for its first argument, `output` for its (first) result.
        heads: Number of heads concatenated in the activation; None if unknown.
        head: The head that is read and replaced; None for all.
    """

    module: nn.Module
    side: Literal["input", "output"]
    heads: int | None = None
    head: int | None = None


@contextmanager
def edited(site: Site, edit: Edit, shape: tuple[int, ...] | None = None) -> Iterator[None]:
    """Replace the activation at `site` by `edit(activation)` in every forward pass inside.

    Args:
        site: The place to edit.
        edit: Maps activations [batch, seq, d] to activations of the same shape. Heads are
            concatenated in `d`. Activations that the model keeps as [batch * seq, d] are reshaped.
        shape: (batch, seq), the shape of the tokens; None to take it from the activation, if the
            model keeps these axes apart.
    """
    with hooked(site, lambda x: _replaced(x, edit, site, shape or x.shape[:2])):
        yield


@contextmanager
def hooked(site: Site, replace: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the value at `site`, in the model's own shape, in every forward pass inside."""
    if site.side == "input":
        handle = site.module.register_forward_pre_hook(
            lambda _, args, kwargs: _with_input(args, kwargs, replace), with_kwargs=True
        )
    else:
        handle = site.module.register_forward_hook(
            lambda _module, _args, output: _with_first(output, replace)
        )
    try:
        yield
    finally:
        handle.remove()


def _replaced(activation: Tensor, edit: Edit, site: Site, shape: tuple[int, ...]) -> Tensor:
    rows = activation.reshape(*shape, -1)
    if site.head is None:
        return edit(rows).reshape(activation.shape)
    assert site.heads is not None
    heads = rows.unflatten(-1, (site.heads, -1))
    one = edit(heads[:, :, site.head])
    heads = heads.clone()
    heads[:, :, site.head] = one
    return heads.reshape(activation.shape)


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], replace: Callable) -> Any:
    if args:
        return (replace(args[0]), *args[1:]), kwargs
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": replace(kwargs["hidden_states"])}
    raise ValueError(
        "Expected argument `hook_name` to name a module that is given its input by position or as "
        f"`hidden_states` but it is given {', '.join(kwargs) or 'nothing'}: choose its output, or "
        "the output of the module before it."
    )


def _with_first(output: Any, replace: Callable) -> Any:
    if isinstance(output, tuple):
        return (replace(output[0]), *output[1:])
    return replace(output)


def is_path(hook_name: str) -> bool:
    """Whether a name is a module's path; TransformerLens' names end in `hook_...`."""
    return ":" in hook_name or not hook_name.rpartition(".")[2].startswith("hook_")


def path_site(model: nn.Module, hook_name: str) -> Site:
    """The site of a module's path, followed by `:in` or `:out` (default `:out`).

    Raises:
        ValueError: If there is no such module; the message lists similar paths.
    """
    path, _, side = hook_name.partition(":")
    modules = dict(model.named_modules())
    if side not in ("", "in", "out") or not path or path not in modules:
        raise ValueError(
            f"Expected argument `hook_name` to be TransformerLens' name of a hook, such as "
            f"blocks.0.hook_resid_post, or the path of a module of the model, followed by "
            f":in or :out, but got `{hook_name}`; {_close(path, modules)}."
        )
    return Site(modules[path], "input" if side == "in" else "output")


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=5, cutoff=0.4)
    return f"similar ones are: {', '.join(close) or 'none'}"


class Block(NamedTuple):
    """One layer of a `transformers` model.

    Attributes:
        module: The layer.
        heads: Number of attention heads; None if the configuration does not say.
    """

    module: nn.Module
    heads: int | None

    def sites(self, hook: str) -> list[Site]:
        """Possible sites of a TransformerLens hook such as `mlp.hook_post`, the likeliest first."""
        block = self.module
        attention, mlp = _first(block, ATTENTION), _first(block, MLP)
        attention_out, mlp_out = _below(attention, ATTENTION_OUT), _first(mlp or block, MLP_OUT)
        places: dict[str, list[nn.Module | None]] = {
            "hook_resid_pre": [block],
            "hook_resid_post": [block],
            "hook_attn_out": [attention, attention_out, _first(block, AFTER_ATTENTION)],
            "hook_mlp_out": [mlp, mlp_out, _first(block, AFTER_MLP)],
            "attn.hook_z": [attention_out],
            "mlp.hook_post": [mlp_out],
        }
        side: Literal["input", "output"] = "output"
        if hook in ("hook_resid_pre", "attn.hook_z", "mlp.hook_post"):
            side = "input"
        heads = self.heads if hook == "attn.hook_z" else None
        return [Site(module, side, heads) for module in places[hook] if module is not None]

    @property
    def attention(self) -> nn.Module | None:
        """Its attention."""
        return _first(self.module, ATTENTION)

    @property
    def mlp(self) -> nn.Module | None:
        """Its MLP; None if the MLP's parts are direct children of the layer."""
        return _first(self.module, MLP)


def native_block(model: Any, hook_name: str) -> tuple[Block, str] | None:
    """The block of a `transformers` model and the common hook of it that a name refers to.

    Returns:
        None if the hook is not a common one, or the blocks cannot be found.

    Raises:
        ValueError: If the layer is out of range.
    """
    match = re.fullmatch(
        r"blocks\.(\d+)\.(hook_(?:resid_pre|resid_post|attn_out|mlp_out)|attn\.hook_z|mlp\.hook_post)",
        hook_name,
    )
    layers = _layers(model)
    if match is None or layers is None:
        return None
    layer = int(match[1])
    if layer >= len(layers):
        raise ValueError(
            f"Expected argument `hook_name` to name a layer from 0 to {len(layers) - 1} but got "
            f"`{hook_name}`: the model has {len(layers)} layers."
        )
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    return Block(layers[layer], heads), match[2]


def _layers(model: Any) -> nn.ModuleList | None:
    """The stack of blocks: the only module list of the configured length."""
    n_layers = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in _outermost_lists(model.get_decoder()) if len(m) == n_layers]
    return stacks[0] if len(stacks) == 1 else None


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _first(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children()) if module is not None else {}
    return next((children[name] for name in names if name in children), None)


def _below(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule, at any depth, with one of the names."""
    inside = module.named_modules() if module is not None else ()
    return next((m for path, m in inside if path.rpartition(".")[2] in names), None)


def lens_site(model: Any, hook_name: str) -> Site:
    """The hook point called `hook_name` of a TransformerBridge or HookedTransformer.

    Raises:
        ValueError: If there is none; the message lists similar names.
    """
    if hook_name in model.hook_dict:
        return Site(model.hook_dict[hook_name], "output")
    raise ValueError(
        f"Expected argument `hook_name` to be a hook of the model but got `{hook_name}`; "
        f"{_close(hook_name, model.hook_dict)}. Its layers are 0 to {model.cfg.n_layers - 1}."
    )
