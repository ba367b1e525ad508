"""Which hooks of which families are exact: `python -m benchmarks.models > docs/models.md`.

Each hook of a small random model of each family is compared with `register_forward_hook` at the
place where the family's code has it: read, and replaced by zeros.
"""

import sys
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from lightning_sae.data.hooks import Site, hooked
from lightning_sae.data.load_model import load_language_model

HOOKS = (
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "attn.hook_z",
    "hook_mlp_out",
    "mlp.hook_post",
)
SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WIDE = {**SIZE, "intermediate_size": 48}
GROUPED = {**WIDE, "num_key_value_heads": 2, "pad_token_id": 0}
HEADS = {**GROUPED, "head_dim": 16}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


class Family(NamedTuple):
    """A family of models, and where a block of it has its attention, MLP and their last products.

    Attributes:
        config: Name of its configuration in `transformers`.
        sizes: Arguments of the configuration.
        blocks: Path of the list of blocks.
        places: In a block: what adds to the residual stream for attention and MLP, and the last
            product of each. Empty where there is none.
    """

    config: str
    sizes: dict[str, Any]
    blocks: str
    places: tuple[str, str, str, str]


LLAMA = ("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj")
EXPERTS = (*LLAMA[:3], "")
NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", *LLAMA[2:])
IN_GPT = ("attn", "mlp", "attn.c_proj", "mlp.c_proj")
BLOOM = ("self_attention.dense", "mlp.dense_4h_to_h") * 2
FAMILIES = {
    "GPT-2": Family("GPT2Config", GPT, "transformer.h", IN_GPT),
    "GPT-J": Family(
        "GPTJConfig",
        {**GPT, "rotary_dim": 4},
        "transformer.h",
        ("attn", "mlp", "attn.out_proj", "mlp.fc_out"),
    ),
    "GPT-NeoX (Pythia)": Family(
        "GPTNeoXConfig",
        WIDE,
        "gpt_neox.layers",
        ("attention", "mlp", "attention.dense", "mlp.dense_4h_to_h"),
    ),
    "Llama": Family("LlamaConfig", GROUPED, "model.layers", LLAMA),
    "Mistral": Family("MistralConfig", GROUPED, "model.layers", LLAMA),
    "Qwen2": Family("Qwen2Config", GROUPED, "model.layers", LLAMA),
    "Qwen3": Family("Qwen3Config", HEADS, "model.layers", LLAMA),
    "Gemma": Family("GemmaConfig", HEADS, "model.layers", LLAMA),
    "Gemma 2": Family("Gemma2Config", HEADS, "model.layers", NORMS),
    "Gemma 3": Family("Gemma3TextConfig", HEADS, "model.layers", NORMS),
    "Phi-3": Family("Phi3Config", GROUPED, "model.layers", LLAMA),
    "OLMo 2": Family("Olmo2Config", GROUPED, "model.layers", NORMS),
    "Falcon": Family("FalconConfig", SIZE, "transformer.h", BLOOM),
    "OPT": Family(
        "OPTConfig",
        {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers",
        ("self_attn", "fc2", "self_attn.out_proj", "fc2"),
    ),
    "BLOOM": Family(
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
        "transformer.h",
        BLOOM,
    ),
    "MPT": Family(
        "MptConfig",
        {"vocab_size": 96, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
        "transformer.blocks",
        ("attn.out_proj", "ffn.down_proj") * 2,
    ),
    "Mixtral": Family(
        "MixtralConfig", {**GROUPED, "num_local_experts": 4}, "model.layers", EXPERTS
    ),
    "Qwen2 MoE": Family(
        "Qwen2MoeConfig",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        "model.layers",
        EXPERTS,
    ),
    "Mamba": Family(
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3},
        "backbone.layers",
        ("", "", "", ""),
    ),
}


def network_of(family: Family) -> Any:
    """A small random model with large weights, so that places differ."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.sizes)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return network


def place_of(network: Any, family: Family, hook: str) -> Site | None:
    """Where block 1 has a hook; None if it has none."""
    block = network.get_submodule(family.blocks)[1]
    if hook in HOOKS[:2]:
        return Site(block, "input" if hook == HOOKS[0] else "output")
    order = ("hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")
    path = family.places[order.index(hook)]
    side: Any = "output" if hook.endswith("_out") else "input"
    return Site(block.get_submodule(path), side) if path else None


@torch.no_grad()
def verdict(network: Any, family: Family, hook: str) -> str:
    """`exact`, `refused`, or `WRONG`."""
    tokens, found = torch.arange(1, 25).view(2, 12), []
    try:
        model = load_language_model(network, f"blocks.1.{hook}")
    except ValueError:
        return "refused"
    site = place_of(network, family, hook)
    if site is None:
        return "WRONG"

    def zeroed(value: Tensor) -> Tensor:
        found.append(value.clone())
        return torch.zeros_like(value)

    with hooked(site, zeroed):
        expected = network(tokens, use_cache=False).logits
    read = torch.equal(model.activations(tokens).flatten(), found[0].flatten())
    replaced = torch.equal(model.logits(tokens, torch.zeros_like), expected)
    return "exact" if read and replaced else "WRONG"


def main() -> None:
    """Print the page."""
    rows = ["| family | " + " | ".join(f"`{hook}`" for hook in HOOKS) + " |", "|---" * 7 + "|"]
    for name, family in FAMILIES.items():
        network = network_of(family)
        found = [verdict(network, family, hook) for hook in HOOKS]
        rows.append(f"| {name} | " + " | ".join(found) + " |")
    sys.stdout.write(PAGE.format(table="\n".join(rows), version=transformers.__version__))


PAGE = """# Language models

`hook_name` is TransformerLens' name of a hook (`blocks.3.hook_resid_post`), or the path of a module
of the model with `:in` or `:out` behind it (`model.layers.3.mlp:out`; `:out` if neither is given).
Each is tried on a few tokens when the model is loaded. A hook that is not what its name says, has
no vector for each token, or is passed several times in a forward pass is refused.

Small random models, transformers {version}. *Exact*: equal, bit for bit, to what
`register_forward_hook` gives at that place, read and replaced by zeros. *Refused*: a `ValueError`
names the hook; a module's path may do instead. Written by
`python -m benchmarks.models > docs/models.md`.

{table}

Hooks beyond these (`attn.hook_q`, `hook_resid_mid`, `ln2.hook_normalized` ...) come from
TransformerLens' wrapper, which runs attention its own way. Its logits must be the model's, the hook
must satisfy the equation that defines it, where there is one, and replacing it must change the
logits.

## How a model is loaded

`model` is a folder, a hub name, or an instance. Its weights have the checkpoint's own dtype unless
`model_dtype` says otherwise. `model_kwargs` are further arguments of `from_pretrained`:

```yaml
data:
  class_path: lightning_sae.ActivationDataModule
  init_args:
    model: models/my-model
    hook_name: blocks.3.hook_resid_post
    model_kwargs:
      revision: main
      attn_implementation: eager
      device_map: auto
      quantization_config: {{quant_method: bitsandbytes, load_in_8bit: true}}
```

- **Quantized models and `device_map`**: the weights stay where `transformers` and `accelerate` put
  them. 4 and 8 bits need `bitsandbytes`. 8-bit products round each token by what else is in the
  batch, so activations differ a little with the batch.
- **A PEFT adapter**: give its folder or hub name as `model`. Activations are those of the adapted
  model. It needs `peft`; a model that is already adapted may be given as an instance.
- `trust_remote_code` is off unless `model_kwargs` sets it.
- Some tokens are tried as soon as a model is loaded. One that does not run, is no causal language
  model, or lacks weights is refused.
- Revision, dtype and quantization are part of `source`, which is saved with every SAE and
  checkpoint; evaluating with another warns.
"""

if __name__ == "__main__":
    main()
