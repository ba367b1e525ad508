"""Edited latents in the language model that comes with the package."""

from typing import Any

import pytest
import torch

from lightning_sae import ReLUSAE
from lightning_sae.analysis.steering import LatentEdit, edit_of, steer, steered
from lightning_sae.data.embedded import EMBEDDED_MODEL
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.load_model import load_language_model

HOOK = "blocks.1.hook_resid_post"
TOKENS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model(EMBEDDED_MODEL, HOOK)


@pytest.fixture(scope="module")
def sae() -> ReLUSAE:
    torch.manual_seed(0)
    sae = ReLUSAE(128, 64).eval()
    sae.source = {"model": "embedded", "hook_name": HOOK}
    sae.input_scale.fill_(2.0)
    sae.input_mean.fill_(0.5)
    return sae


def test_ablating_nothing_with_the_error_term_changes_no_logit(
    model: LanguageModel, sae: ReLUSAE
) -> None:
    before = model.logits(TOKENS)
    with steered(model, sae, []):
        after = model.logits(TOKENS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert torch.equal(model.logits(TOKENS), before)


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (LatentEdit(7, "add", 3.0), lambda f: 3.0 + 0 * f),
        (LatentEdit(7, "clamp", 2.0), lambda f: 2.0 - f),
        (LatentEdit(7, "ablate"), lambda f: -f),
    ],
)
def test_an_edit_moves_activations_along_the_decoder_row(
    model: LanguageModel, sae: ReLUSAE, edit: LatentEdit, change: Any, error_term: bool
) -> None:
    x = model.activations(TOKENS)
    f = sae.encode(x)[..., 7:8].detach()
    base = x if error_term else sae(x).detach()
    found = edit_of(sae, [edit], error_term=error_term)(x)
    torch.testing.assert_close(found, base + change(f) * sae.W_dec[7].detach(), rtol=0, atol=1e-4)


def test_only_the_positions_asked_for_change(model: LanguageModel, sae: ReLUSAE) -> None:
    x = model.activations(TOKENS)
    found = edit_of(sae, [LatentEdit(0, "add", 5.0)], positions=[2, 9])(x)
    changed = (found != x).any(-1)
    assert changed.nonzero()[:, 1].unique().tolist() == [2, 9]


def test_a_transformers_model_is_steered_under_generate(model: LanguageModel, sae: ReLUSAE) -> None:
    network: Any = model.network
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS[:1]
    alone = network.generate(prompt, **arguments)
    push = LatentEdit(3, "clamp", 500.0)
    with steered(network, sae, [push]):
        pushed = network.generate(prompt, **arguments)
    by_hand = prompt
    for _ in range(5):
        nxt = model.logits(by_hand, edit_of(sae, [push]))[0, -1].argmax()
        by_hand = torch.cat([by_hand, nxt.view(1, 1)], 1)
    assert torch.equal(pushed, by_hand)
    assert not torch.equal(pushed, alone)
    assert torch.equal(network.generate(prompt, **arguments), alone)


def test_the_command_gives_the_models_own_probabilities(sae: ReLUSAE, tmp_path: Any) -> None:
    path = str(sae.save_pretrained(tmp_path / "sae"))
    found = steer(path, prompt="def ", latent=3, clamp=500.0, new_tokens=3, top=4)
    assert len(found.tokens) == 4
    assert all(0 <= before <= 1 and 0 <= after <= 1 for _, before, after in found.tokens)
    assert found.before != found.after
    nothing = steer(path, prompt="def ", latent=[3, 4], add=0.0, new_tokens=3)
    assert nothing.before == nothing.after == found.before


def test_what_cannot_be_steered_is_refused(
    model: LanguageModel, sae: ReLUSAE, tmp_path: Any
) -> None:
    path = str(sae.save_pretrained(tmp_path / "sae"))
    with pytest.raises(ValueError, match="one of the arguments `add`, `clamp` and `ablate`"):
        steer(path, prompt="def", latent=0)
    with pytest.raises(ValueError, match="but got add, clamp"):
        steer(path, prompt="def", latent=0, add=1.0, clamp=1.0)
    with pytest.raises(ValueError, match="from 0 to 63 but got 64"):
        steer(path, prompt="def", latent=64, ablate=True)
    other = ReLUSAE(128, 64)
    with pytest.raises(ValueError, match="does not name its hook"), steered(model, other, []):
        pass
