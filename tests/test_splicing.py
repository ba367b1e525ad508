"""The lines of docs/splicing.md, as they stand there."""

import re
from pathlib import Path

import torch

from lightning_sae import TopKSAE
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.load_model import load_language_model


def blocks(repository: Path, title: str) -> list[str]:
    """The code blocks of a section."""
    text = (repository / "docs" / "splicing.md").read_text()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def randomised(hook: str) -> TopKSAE:
    sae = TopKSAE(128, 64, k=4)
    torch.nn.init.normal_(sae.b_dec)
    sae.source = {"hook_name": hook}
    return sae.eval()


@torch.no_grad()
def test_in_transformer_lens_the_logits_are_those_of_our_own_splicing(repository: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    tokens = torch.arange(3, 19).view(2, 8)
    whole, heads = blocks(repository, "TransformerLens")
    model = TransformerBridge.boot_transformers(str(EMBEDDED_MODEL), device="cpu")
    for hook, code in (
        ("blocks.2.hook_resid_post", whole),
        ("blocks.1.attn.hook_z", whole.replace("lambda x, hook: sae(x)", heads.strip())),
    ):
        sae = randomised(hook)
        own = load_language_model(EMBEDDED_MODEL, hook).logits(tokens, sae)
        names = {"sae": sae, "model": model, "tokens": tokens}
        exec(code, names)
        torch.testing.assert_close(names["logits"], own, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(tokens), own, atol=0.1)


@torch.no_grad()
def test_in_transformers_the_logits_are_those_of_our_own_splicing(repository: Path) -> None:
    tokens, sae = torch.arange(3, 19).view(2, 8), randomised("blocks.2.hook_resid_post")
    loaded = load_language_model(EMBEDDED_MODEL, sae.source["hook_name"])
    names = {"sae": sae, "model": loaded.network, "tokens": tokens}
    exec(blocks(repository, "transformers alone")[0], names)
    torch.testing.assert_close(names["logits"], loaded.logits(tokens, sae))
