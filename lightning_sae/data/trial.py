"""Check on a few tokens, before any work, that a hook gives what its name says.

A name such as `hook_mlp_out` has the same meaning in all families of models: here, what the MLP
adds to the residual stream. The check reads the activations in a forward pass and tests the
equations that define the name. A hook that does not satisfy them is refused.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_sae.data.hooks import Block, Site, hooked, lens_site

Run = Callable[[Int[Tensor, "batch seq"]], Tensor]
"""Logits from tokens."""

LENGTH = 7
OTHER_LENGTH = 5
# Module sides that the bridge's own hook names refer to. Other names are explicit:
# `mlp.out.hook_in`.
ALIASES = {
    "hook_embed": ("embed.hook_out", "embed_ln.hook_out"),
    "hook_pos_embed": ("pos_embed.hook_out",),
    "hook_unembed": ("unembed.hook_out",),
    "hook_resid_pre": ("hook_in",),
    "hook_resid_post": ("hook_out",),
    "attn.hook_q": ("attn.q.hook_out",),
    "attn.hook_k": ("attn.k.hook_out",),
    "attn.hook_v": ("attn.v.hook_out",),
    "attn.hook_z": ("attn.o.hook_in",),
    "mlp.hook_pre": ("mlp.gate.hook_out", "mlp.in.hook_out"),
    "mlp.hook_pre_linear": ("mlp.in.hook_out",),
    "mlp.hook_post": ("mlp.out.hook_in",),
}
BY_EQUATION = ("hook_attn_out", "hook_mlp_out", "hook_resid_mid")


def trial_tokens(n: int, length: int = LENGTH) -> Int[Tensor, "2 length"]:
    """Two short rows of different tokens, all below `n`."""
    return torch.arange(1, 2 * length + 1).view(2, length) % n


def require_causal(
    run: Run, tokens: Int[Tensor, "batch seq"], name: str, *, quantized: bool = False
) -> None:
    """Raise a ValueError if a later token changes the prediction of every earlier one.

    Args:
        run: Logits from tokens.
        tokens: Rows of tokens to try.
        name: The model's name.
        quantized: Whether the weights are quantised: 8-bit products round a row depending on the
            rest of the batch.
    """
    other = tokens.clone()
    other[:, -1] = tokens[:, 0]
    logits = run(tokens)
    change = (run(other) - logits)[:, :-1].abs().amax(-1)
    exact = 1e-5 if logits.dtype == torch.float32 else 1e-3
    tolerance = 1e-2 if quantized else exact
    if tokens.shape[1] > 1 and change.min() > tolerance * logits.abs().max():
        raise ValueError(
            f"Expected argument `model` to be a causal language model but in {name} a later token "
            "changes what is predicted before it, as in an encoder (BERT): give a model that "
            "predicts the next token."
        )


def require_rows(run: Run, site: Site, name: str, vocabulary: int) -> None:
    """Raise a ValueError unless a site gives one vector per token, once per pass."""
    shapes = []
    for length in (LENGTH, OTHER_LENGTH):
        tokens = trial_tokens(vocabulary, length)
        with _recorded({"here": site}) as found:
            run(tokens)
        values = found["here"]
        if not values:
            raise ValueError(
                f"Expected argument `hook_name` to be reached in the forward pass but `{name}` was "
                "not: the model does not compute it; choose another hook."
            )
        if len(values) > 1:
            raise ValueError(
                f"Expected argument `hook_name` to be passed once in a forward pass but `{name}` "
                f"is passed {len(values)} times: choose the module that calls it."
            )
        value = values[0]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Expected argument `hook_name` to give activations but `{name}` gives {kind}: "
                "choose another hook."
            )
        shapes.append((_by_token(value, tokens), tuple(value.shape)))
    (one, shape), (other, _) = shapes
    if one is None or other is None or one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"Expected argument `hook_name` to give a vector for each token but `{name}` gives "
            f"{list(shape)} for 2 rows of {LENGTH} tokens: choose a hook whose first axes are "
            "[batch, position], such as attn.hook_q, attn.hook_k or attn.hook_z."
        )


def native_site(run: Run, block: Block, hook: str, name: str, vocabulary: int) -> Site:
    """Of the candidate sites in a block, the one whose activation is what the hook's name says.

    Raises:
        ValueError: If there is none.
    """
    tried = block.sites(hook)
    if hook in ("hook_resid_pre", "hook_resid_post") and tried:
        return tried[0]
    tokens = trial_tokens(vocabulary)
    parts = {"attention": block.attention, "mlp": block.mlp}
    sites = {k: Site(m, "output") for k, m in parts.items() if m is not None}
    sites |= {h: block.sites(h)[0] for h in ("hook_resid_pre", "hook_resid_post")}
    for h in ("hook_attn_out", "hook_mlp_out"):
        sites |= {f"{h} {i}": site for i, site in enumerate(block.sites(h))}
    for i, site in enumerate(tried):
        sites |= {f"tried {i}": site, f"after {i}": site._replace(side="output")}
    with _recorded(sites) as found:
        run(tokens)
    values = {k: _by_token(v[0], tokens) for k, v in found.items() if len(v) == 1}
    added = _what_is_added(values)
    for i, site in enumerate(tried):
        here, after = values.get(f"tried {i}"), values.get(f"after {i}")
        if here is None or after is None:
            continue
        if hook in added and _same(here, added[hook]):
            return site
        whole = "attention" if hook == "attn.hook_z" else "mlp"
        part = added.get("hook_attn_out" if hook == "attn.hook_z" else "hook_mlp_out")
        last = _same(after, values.get(whole)) or _same(after, part)
        if hook == "attn.hook_z" and last and mixes_values(run, site, block.attention, vocabulary):
            return site
        if hook == "mlp.hook_post" and last and not _has_norm(block.mlp):
            return site
    raise ValueError(
        f"Expected argument `hook_name` to be a hook that the model has but got `{name}`: no place "
        f"in a {type(block.module).__name__} is what this name means. Give a module's path, with "
        "followed by :in or :out, such as those that `model.named_modules()` lists."
    )


def _what_is_added(values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The outputs of attention and MLP that satisfy post = pre + attention + MLP."""
    pre, post = values.get("hook_resid_pre"), values.get("hook_resid_post")
    if pre is None or post is None:
        return {}
    for a in (v for k, v in values.items() if k.startswith("hook_attn_out ")):
        for m in (v for k, v in values.items() if k.startswith("hook_mlp_out ")):
            if a is not None and m is not None and _is_sum(post, pre, a, m):
                return {"hook_attn_out": a, "hook_mlp_out": m}
    return {}


def _has_norm(mlp: nn.Module | None) -> bool:
    """Whether an MLP has a norm before its last matrix, whose input is then no activation."""
    children = mlp.children() if mlp is not None else ()
    return any(w.dim() == 1 for c in children for n, w in c.named_parameters() if n == "weight")


def mixes_values(run: Run, site: Site, attention: nn.Module | None, vocabulary: int) -> bool:
    """Whether a site gives each head's values averaged by its attention pattern.

    The first token attends only to itself, so there each head's output is its value vector.
    """
    if attention is None or site.heads is None:
        return False
    tokens = trial_tokens(vocabulary)
    sites = {str(i): Site(m, "output") for i, m in enumerate(attention.modules())}
    with _recorded({"z": site, **sites}) as found:
        run(tokens)
    z = _by_token(found.pop("z")[0], tokens)
    if z is None or z.shape[-1] % site.heads:
        return False
    heads = z[0, 0].unflatten(0, (site.heads, -1)).float()
    width = heads.shape[-1]
    outputs = [_by_token(v, tokens) for called in found.values() for v in called]
    rows = [x[0, 0].float() for x in outputs if x is not None and x.shape[-1] % width == 0]
    if not rows:
        return False
    values = torch.cat(rows).unflatten(0, (-1, width))
    distance = (heads[:, None] - values).abs().amax(-1).amin(1)
    return bool((distance <= 4 * torch.finfo(z.dtype).eps * heads.abs().amax()).all())


def require_lens(model: Any, run: Run, name: str, vocabulary: int) -> Site:
    """The hook point of that name, of a TransformerBridge or HookedTransformer.

    Raises:
        ValueError: If there is none, or it is not what its name says.
    """
    site = lens_site(model, name)
    prefix, hook = _split(name)
    true_name = _split(site.module.name or name)[1]  # type: ignore[arg-type]
    if true_name != hook and hook not in BY_EQUATION and true_name not in ALIASES.get(hook, ()):
        raise ValueError(
            f"Expected argument `hook_name` to be a hook that the model has but got `{name}`, "
            f"which TransformerLens gives as another name of {prefix}{true_name}: choose that, if "
            "you mean it."
        )
    require_rows(run, site, name, vocabulary)
    site = site._replace(heads=_heads(model, site, hook, run, vocabulary))
    if not _satisfies(model, run, site, prefix, hook, vocabulary):
        raise ValueError(
            f"Expected argument `hook_name` to be a hook that the model has but what "
            f"TransformerLens gives as `{name}` is not what the name means: choose another hook, "
            "or give the model by name and the hook as a module's path."
        )
    tokens = trial_tokens(vocabulary)
    plain = run(tokens)
    with hooked(site, _ramp), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an edited norm may be computed in another way
        changed = run(tokens)
    if torch.equal(plain, changed):
        raise ValueError(
            f"Expected argument `hook_name` to be a hook that the model computes with but "
            f"replacing `{name}` changes nothing: choose another hook."
        )
    return site


def _split(name: str) -> tuple[str, str]:
    """`blocks.3.` and the rest of a hook's name."""
    parts = name.split(".")
    at = 2 if parts[0] == "blocks" else 0
    return "".join(f"{part}." for part in parts[:at]), ".".join(parts[at:])


def _heads(model: Any, site: Site, hook: str, run: Run, vocabulary: int) -> int | None:
    if hook not in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"):
        return None
    with _recorded({"here": site}) as found:
        run(trial_tokens(vocabulary))
    if found["here"][0].dim() == 4:
        return found["here"][0].shape[2]
    of_keys = getattr(model.cfg, "n_key_value_heads", None)
    return of_keys or model.cfg.n_heads if hook[-1] in "kv" else model.cfg.n_heads


def _satisfies(model: Any, run: Run, site: Site, prefix: str, hook: str, vocabulary: int) -> bool:
    """Whether the equation that defines a hook holds, where there is one."""
    if hook == "attn.hook_z":
        attention = model.get_submodule(f"{prefix}attn")
        return mixes_values(run, site, attention, vocabulary)
    if hook not in (*BY_EQUATION, "hook_embed", "hook_pos_embed"):
        return True
    if prefix:
        names = [f"{prefix}hook_{end}" for end in ("resid_post", "resid_pre", "attn_out")]
        names += [f"{prefix}hook_mlp_out"]
        if hook == "hook_resid_mid":
            names[0], names[3:] = f"{prefix}hook_resid_mid", []
    else:
        names = ["blocks.0.hook_resid_pre", "hook_embed", "hook_pos_embed"]
    tokens = trial_tokens(vocabulary)
    sites = {n: lens_site(model, n) for n in names if n in model.hook_dict}
    with _recorded(sites) as found:
        run(tokens)
    values = [_by_token(v[0], tokens) for v in found.values() if v]
    total, *parts = [v for v in values if v is not None]
    return _is_sum(total, *parts)


def _ramp(value: Tensor) -> Tensor:
    """Different activations that no norm maps to the same output."""
    return torch.linspace(-1, 1, value.shape[-1]).to(value).expand_as(value)


@contextmanager
def _recorded(sites: Mapping[str, Site]) -> Iterator[dict[str, list[Any]]]:
    """The values at each site, one per call."""
    found: dict[str, list[Any]] = {name: [] for name in sites}
    with ExitStack() as stack, torch.no_grad():
        for name, site in sites.items():

            def keep(value: Any, name: str = name) -> Any:
                # The model may change it in place.
                found[name].append(value.clone() if isinstance(value, Tensor) else value)
                return value

            stack.enter_context(hooked(site, keep))
        yield found


def _by_token(value: Any, tokens: Int[Tensor, "batch seq"]) -> Tensor | None:
    """An activation as [batch, seq, d]; None if its first axes are not batch and seq."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if value.shape[:2] == tokens.shape:
        return value.flatten(2) if value.dim() > 2 else None
    if value.dim() == 2 and len(value) == tokens.numel():
        return value.view(*tokens.shape, -1)
    return None


def _same(x: Tensor, y: Tensor | None) -> bool:
    return y is not None and _is_sum(x, y)


def _is_sum(total: Tensor, *parts: Tensor) -> bool:
    """Whether a tensor is the sum of others, up to rounding."""
    if any(part.shape != total.shape for part in parts):
        return False
    size = sum(part.abs().double() for part in parts)
    gap = (total.double() - sum(part.double() for part in parts)).abs()
    return bool((gap <= 4 * torch.finfo(total.dtype).eps * size).all())
