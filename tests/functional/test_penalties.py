import pytest
import torch

from lightning_sae.functional.penalties import l1


def test_l1_is_summed_over_latents_and_averaged_over_the_batch() -> None:
    f = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 5.0]])
    assert l1(f).item() == pytest.approx((3 + 5) / 2)


def test_l1_weights_each_latent() -> None:
    f = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert l1(f, torch.tensor([10.0, 0.5])).item() == pytest.approx((10 + 1 + 30) / 2)
