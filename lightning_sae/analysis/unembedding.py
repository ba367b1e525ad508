"""From an SAE's hook to the logits, through the weights of the language model alone."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sae.data.language_model import LanguageModel

FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm", "norm_f", "embedding_norm")


class Unembedding(NamedTuple):
    """The direct effect of a direction at a hook on the logits, ignoring the layers between.

    Attributes:
        to_residual: Output matrix of the attention or MLP whose input is the hook; None on the
            residual stream.
        matrix: The unembedding, with the scale of the final norm folded in.
        note: A description of what was folded in.
    """

    to_residual: Float[Tensor, "d_in d_model"] | None
    matrix: Float[Tensor, "d_model vocab"]
    note: str


def unembedding_of(model: LanguageModel) -> Unembedding | None:
    """The unembedding of a language model as seen from its hook.

    The scale of the final norm is folded into the matrix, and for a LayerNorm its centring. The
    norm's divisor depends on the input and is left out, so logits are known up to a positive
    factor.

    Returns:
        None if the model has no unembedding, or the hook's activations are not of the residual
        stream's width and do not enter a linear layer.
    """
    network: Any = getattr(model.network, "original_model", model.network)  # of a TransformerBridge
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    if head is None:
        return None
    matrix, note = head.weight.detach().float().T, "no final norm was found"
    norm = _final_norm(network)
    if norm is not None:
        matrix, note = _folded(norm, matrix)
    to_residual = _output_matrix(model.site.module) if model.site.side == "input" else None
    width = model.width() if to_residual is None else to_residual.shape[1]
    return Unembedding(to_residual, matrix, note) if width == matrix.shape[0] else None


def _final_norm(network: nn.Module) -> nn.Module | None:
    """The norm before the unembedding: the last module outside the blocks so named."""
    found = None
    for name, module in network.named_modules():
        *_, last = name.split(".")
        inside = any(part.isdigit() for part in name.split("."))
        if last in FINAL_NORMS and not inside and getattr(module, "weight", None) is not None:
            found = module
    return found


def _folded(norm: Any, matrix: Float[Tensor, "d_model vocab"]) -> tuple[Tensor, str]:
    scale = norm.weight.detach().float()
    if "Gemma" in type(norm).__name__:  # its norm multiplies by 1 + weight
        scale = 1 + scale
    matrix = scale.unsqueeze(1) * matrix
    if isinstance(norm, nn.LayerNorm):
        return matrix - matrix.mean(0), "the final LayerNorm's scale and centring are folded in"
    return matrix, "the final norm's scale is folded in"


def _output_matrix(module: nn.Module) -> Float[Tensor, "d_in d_model"] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    weight = weight.detach().float()
    return weight.T if isinstance(module, nn.Linear) else weight  # GPT-2's Conv1D has it [in, out]


@torch.no_grad()
def null_space_matrix(model: LanguageModel) -> Float[Tensor, "d_in d_model"] | None:
    """The output matrix after the hook, for its null space; None on the residual stream."""
    return _output_matrix(model.site.module) if model.site.side == "input" else None
