"""SAEBench: wrap an SAE as the object that its evaluations take.

Its evaluations call `encode` and `decode`, read `W_enc`, `W_dec`, `b_enc`, `dtype` and `device`,
and find model and hook in `cfg` (sae-bench 0.6, `sae_bench/custom_saes/base_sae.py`). They expect
decoder rows of norm 1.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.architectures.portable import folded_state
from lightning_sae.checks import expect


@dataclass
class Settings:
    """The fields of SAEBench's `CustomSAEConfig`, under the same names."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool | None = None
    finetuning_scaling_factor: bool | None = None
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = 0
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, without those that SAEBench adds."""
        return asdict(self)


class ForSAEBench(nn.Module):
    """An SAE with decoder rows of norm 1; latents are in the units of the activations' norm.

    Args:
        sae: The SAE, which is not changed.
        settings: Its model and hook.
    """

    hook_z_reshaping_mode = False  # activations come flat

    def __init__(self, sae: SparseAutoencoder, settings: Settings) -> None:
        super().__init__()
        state = folded_state(sae)
        norms = sae.W_dec.detach().float().norm(dim=-1)
        self.sae, self.cfg = sae, settings
        self.norms: Float[Tensor, " d_sae"]
        # A latent with a zero decoder row is left unchanged.
        self.register_buffer("norms", torch.where(norms > 0, norms, 1.0))
        self.W_enc = nn.Parameter(sae.W_enc.detach().float() * self.norms)
        self.W_dec = nn.Parameter(state["W_dec"].float() / self.norms[:, None])
        b_enc = state.get("b_enc", torch.zeros(sae.d_sae))  # a tied SAE has none
        self.b_enc = nn.Parameter(b_enc.float() * self.norms)
        self.b_dec = nn.Parameter(state["b_dec"].float())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.W_dec.dtype

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Latents of raw activations, times the norms of the SAE's decoder rows."""
        return (self.sae.encode(x) * self.norms).to(x.dtype)

    @torch.no_grad()
    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """Raw activations reconstructed from such latents."""
        return self.sae.decode(f / self.norms).to(f.dtype)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """Reconstruct raw activations."""
        return self.decode(self.encode(x))

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """No-op, because activations come flat."""

    turn_on_forward_pass_hook_z_reshaping = turn_off_forward_pass_hook_z_reshaping


def for_saebench(
    sae: SparseAutoencoder, model_name: str | None = None, **settings: Any
) -> ForSAEBench:
    """The object that SAEBench's evaluations take as a custom SAE.

    Example::

        selected = [("mine", for_saebench(sae))]
        core.multiple_evals(selected, ...)

    Args:
        sae: The SAE.
        model_name: Name or folder by which TransformerLens loads the model; by default the one
            that the SAE was trained on.
        settings: Further fields of `Settings`, as `model_from_pretrained_kwargs`.

    Raises:
        ValueError: If the SAE does not name a model and a hook in a layer.
    """
    source = sae.source
    model, hook = model_name or source.get("model"), str(source.get("hook_name", ""))
    expect(bool(model), "model_name", "given, for the SAE names no model", model)
    layer = re.search(r"\.(\d+)\.", hook)
    if layer is None:
        raise ValueError(
            f"Expected an SAE of a hook in a layer but its `source` names {hook or 'none'}: "
            'give it, `sae.source["hook_name"] = "blocks.3.hook_resid_post"`.'
        )
    known = {
        "hook_name": hook,
        "hook_layer": int(layer[1]),
        "hook_head_index": source.get("head"),
        "context_size": source.get("context_length"),
        "architecture": type(sae).__name__,
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "training_tokens": sae.n_trained,
    }
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae}
    found = Settings(model_name=str(model), **sizes, **{**known, **settings})  # type: ignore[arg-type]
    return ForSAEBench(sae, found)
