"""The object for SAEBench; `make interop` has SAEBench itself look at one."""

import pytest
import torch

from lightning_sae import BatchTopKSAE, GatedSAE, ReLUSAE, SparseAutoencoder, TiedSAE
from lightning_sae.interop.saebench import for_saebench

SOURCE = {"model": "some/model", "hook_name": "blocks.3.hook_resid_post", "context_length": 64}


def randomised(sae: SparseAutoencoder) -> SparseAutoencoder:
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    sae.input_mean.copy_(torch.randn(4))
    sae.input_scale.fill_(3.0)
    sae.source = dict(SOURCE)
    return sae.eval()


@pytest.mark.parametrize(
    "sae",
    [
        ReLUSAE(4, 8, decoder_norm="free"),
        ReLUSAE(4, 8, apply_b_dec_to_input=False),
        TiedSAE(4, 8),
        GatedSAE(4, 8),
        BatchTopKSAE(4, 8, k=2.5),
    ],
    ids=lambda sae: type(sae).__name__,
)
def test_its_reconstruction_is_the_saes_and_its_rows_have_norm_one(sae: SparseAutoencoder) -> None:
    sae, x = randomised(sae), torch.randn(3, 5, 4)
    found = for_saebench(sae)
    torch.testing.assert_close(found.W_dec.norm(dim=-1), torch.ones(8))
    f = found.encode(x)
    assert f.shape == (3, 5, 8)
    torch.testing.assert_close(found(x), sae(x))
    torch.testing.assert_close(found.decode(f), sae(x))
    torch.testing.assert_close(f, sae.encode(x) * sae.W_dec.norm(dim=-1))
    torch.testing.assert_close(f @ found.W_dec + found.b_dec, sae(x))  # what others decode by


def test_relu_latents_follow_from_the_weights_it_shows() -> None:
    sae, x = randomised(ReLUSAE(4, 8, decoder_norm="free")), torch.randn(7, 4)
    found = for_saebench(sae)
    shown = ((x - found.b_dec) @ found.W_enc + found.b_enc).relu()
    torch.testing.assert_close(found.encode(x), shown)


def test_its_settings_say_where_it_belongs() -> None:
    cfg = for_saebench(randomised(ReLUSAE(4, 8))).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("some/model", SOURCE["hook_name"], 3)
    assert (cfg.d_in, cfg.d_sae, cfg.context_size, cfg.dtype) == (4, 8, 64, "float32")
    cfg = for_saebench(randomised(ReLUSAE(4, 8)), "gpt2", prepend_bos=False).cfg
    assert (cfg.to_dict()["model_name"], cfg.prepend_bos) == ("gpt2", False)


def test_device_and_dtype_follow_a_conversion() -> None:
    found = for_saebench(randomised(ReLUSAE(4, 8))).to(device="cpu", dtype=torch.bfloat16)
    assert (found.dtype, found.device.type) == (torch.bfloat16, "cpu")
    assert found(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_sae_that_names_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="`model_name` to be given, for the SAE names no model"):
        for_saebench(ReLUSAE(4, 8))
    with pytest.raises(ValueError, match="hook in a layer but its `source` names none: give it"):
        for_saebench(ReLUSAE(4, 8), "gpt2")
