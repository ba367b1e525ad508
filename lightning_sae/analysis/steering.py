"""An SAE spliced into a language model, with some of its latents edited.

At the hook, the activation x becomes

    x' = SAE.decode(edit(f)) + (x - SAE.decode(f)),    f = SAE.encode(x)

With the error term in brackets, x' - x is exactly the change that the edit makes to the
reconstruction; without it, x' is the reconstruction from the edited latents.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.hooks import edited
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.load_model import load_language_model
from lightning_sae.loading import load


class LatentEdit(NamedTuple):
    """A change of one latent.

    Attributes:
        latent: Index of the latent.
        kind: `add` to the activation, `clamp` it to a value, or `ablate` it.
        value: Value to add, or to clamp to.
    """

    latent: int
    kind: Literal["add", "clamp", "ablate"]
    value: float = 0.0

    def apply(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The latent's activations after the change; `add` does not go below zero."""
        if self.kind == "add":
            return (f + self.value).clamp_min(0)
        return torch.full_like(f, self.value if self.kind == "clamp" else 0.0)


def edit_of(
    sae: SparseAutoencoder,
    edits: list[LatentEdit],
    *,
    error_term: bool = True,
    positions: list[int] | None = None,
) -> Callable[[Float[Tensor, "batch seq d_in"]], Float[Tensor, "batch seq d_in"]]:
    """The function that replaces the activations at the hook.

    Args:
        sae: The SAE.
        edits: Changes of latents.
        error_term: Whether to add back the SAE's reconstruction error.
        positions: Positions of the prompt to change; all by default. During generation, new tokens
            are changed only if all positions are.

    Raises:
        ValueError: If a latent is out of range.
    """
    for edit in edits:
        if not 0 <= edit.latent < sae.d_sae:
            raise ValueError(
                f"Expected argument `latent` to be from 0 to {sae.d_sae - 1} but got {edit.latent}."
            )

    @torch.no_grad()
    def replace(x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_in"]:
        inputs = x.to(sae.W_dec)
        f = sae.encode(inputs)
        if error_term:
            change = torch.zeros_like(f)
            for edit in edits:
                before = f[..., edit.latent]
                change[..., edit.latent] = edit.apply(before) - before
            new = inputs + sae.decode(f + change) - sae.decode(f)
        else:
            for edit in edits:
                f[..., edit.latent] = edit.apply(f[..., edit.latent])
            new = sae.decode(f)
        if positions is None:
            return new.to(x)
        chosen = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        if x.shape[1] > 1:  # the prompt; later passes hold one token each
            chosen[[p for p in positions if p < x.shape[1]]] = True
        return torch.where(chosen.unsqueeze(-1), new.to(x), x)

    return replace


@contextmanager
def steered(
    model: LanguageModel | nn.Module,
    sae: SparseAutoencoder,
    edits: list[LatentEdit],
    *,
    error_term: bool = True,
    positions: list[int] | None = None,
    hook_name: str | None = None,
) -> Iterator[None]:
    """Splice an SAE with edited latents into a language model, also under `generate`.

    Example::

        with steered(model, sae, [LatentEdit(12, "add", 4.0)]):
            model.generate(**tokenizer("Once", return_tensors="pt"))

    Args:
        model: A `LanguageModel`, or a model of `transformers`.
        sae: The SAE.
        edits: Changes of latents.
        error_term: Whether to add back the SAE's reconstruction error.
        positions: Positions of the prompt to change; all by default.
        hook_name: The hook; by default the one at which the SAE was trained.

    Raises:
        ValueError: If there is no such hook, or a latent is out of range.
    """
    hook = hook_name or sae.source.get("hook_name")
    if not hook:
        raise ValueError(
            "Expected argument `hook_name` to be given, for the SAE does not name its hook."
        )
    loaded = model if isinstance(model, LanguageModel) else load_language_model(model, hook)
    loaded = loaded if loaded.hook_name == hook else loaded.at(hook)
    edit = edit_of(sae, edits, error_term=error_term, positions=positions)
    with edited(loaded.site, edit):
        yield


class Steering(NamedTuple):
    """What an edit changes.

    Attributes:
        tokens: Texts of the next tokens whose probabilities change most, with the probability
            before and after.
        before: The continuation without the edit.
        after: The continuation with it.
    """

    tokens: list[tuple[str, float, float]]
    before: str
    after: str


def steer(
    sae: str,
    *,
    prompt: str,
    latent: int | list[int],
    add: float | None = None,
    clamp: float | None = None,
    ablate: bool = False,
    model: str | None = None,
    hook_name: str | None = None,
    positions: list[int] | None = None,
    error_term: bool = True,
    new_tokens: int = 30,
    top: int = 10,
) -> Steering:
    """Edit latents of an SAE in its language model, and print what changes.

    Args:
        sae: Folder that `save_pretrained` wrote, or a checkpoint.
        prompt: Text that the model reads.
        latent: Latent to edit, or several.
        add: Value to add to their activations.
        clamp: Value to set their activations to.
        ablate: Whether to set them to 0.
        model: Folder or hub name of the language model; by default the SAE's own.
        hook_name: Its hook; by default the SAE's own.
        positions: Positions of the prompt at which latents are edited; all by default.
        error_term: Whether to add back the SAE's reconstruction error.
        new_tokens: Length of the continuations, which take the likeliest token at each step.
        top: Rows of the table of next tokens.

    Raises:
        ValueError: If there is no such SAE, model or latent, or not one of `add`, `clamp` and
            `ablate` is given.
    """
    ways = {"add": add, "clamp": clamp, "ablate": 0.0 if ablate else None}
    given = [(kind, value) for kind, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            "Expected one of the arguments `add`, `clamp` and `ablate` but got "
            f"{', '.join(kind for kind, _ in given) or 'none'}."
        )
    kind, value = given[0]
    latents = [latent] if isinstance(latent, int) else latent
    edits = [LatentEdit(each, kind, value) for each in latents]  # type: ignore[arg-type]
    trained = load(sae)
    name, hook = model or trained.source.get("model"), hook_name or trained.source.get("hook_name")
    if not name or not hook or name == "toy":
        raise ValueError(
            f"Expected the SAE to name a language model and a hook but it names "
            f"{trained.source or 'nothing'}: give `model` and `hook_name`."
        )
    language_model = load_language_model(EMBEDDED_MODEL if name == "embedded" else name, hook)
    edit = edit_of(trained, edits, error_term=error_term, positions=positions)
    return _steering(language_model, edit, prompt, new_tokens, top)


def _steering(
    model: LanguageModel, edit: Callable[[Tensor], Tensor], prompt: str, new_tokens: int, top: int
) -> Steering:
    tokenizer: Any = model.tokenizer
    start = tokenizer.bos_token_id
    ids = ([] if start is None else [start]) + tokenizer(prompt, add_special_tokens=False).input_ids
    tokens = torch.tensor([ids])
    before = model.logits(tokens)[0, -1].float().softmax(-1)
    after = model.logits(tokens, edit)[0, -1].float().softmax(-1)
    most = (after - before).abs().topk(min(top, len(before))).indices
    rows = [(tokenizer.decode([i]), float(before[i]), float(after[i])) for i in most.tolist()]
    texts = [_continued(model, tokens, new_tokens, each) for each in (None, edit)]
    return Steering(rows, *texts)


def _continued(
    model: LanguageModel,
    tokens: Tensor,
    new_tokens: int,
    edit: Callable[[Tensor], Tensor] | None,
) -> str:
    start = tokens.shape[1]
    for _ in range(new_tokens):
        nxt = model.logits(tokens, edit)[0, -1].argmax()
        tokens = torch.cat([tokens, nxt.view(1, 1).to(tokens)], 1)
    return model.tokenizer.decode(tokens[0, start:].tolist())


def main(args: list[str]) -> None:
    """Run `lightning-sae steer`."""
    found: Steering = auto_cli(steer, args=args, prog="lightning-sae steer")
    rows = [f"  {text!r:<20} {p:>8.4f} {q:>8.4f} {q - p:>+9.4f}" for text, p, q in found.tokens]
    sys.stdout.write(
        "\n".join(
            [
                "\nNext token              before    after    change",
                *rows,
                f"\nWithout the edit: {found.before!r}",
                f"With the edit:    {found.after!r}",
                "",
            ]
        )
    )
