"""A rescaled and shifted ReLU is a gated SAE with other parameters."""

import pytest
import torch

from lightning_sae import GatedSAE, RescaleAndShiftSAE
from lightning_sae.studies.gated.equivalence import against_gated, as_gated

D_IN, D_SAE = 6, 10


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae() -> RescaleAndShiftSAE:
    """One whose parameters are all different from their initial values."""
    torch.manual_seed(0)
    sae = RescaleAndShiftSAE(D_IN, D_SAE, l1_coefficient=0.7)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(D_SAE))
        sae.r_mag.copy_(0.3 * torch.randn(D_SAE))
        sae.b_mag.copy_(torch.rand(D_SAE))  # at least 0: no magnitude is negative
        sae.b_dec.copy_(torch.randn(D_IN))
    return sae


def gated_of(sae: RescaleAndShiftSAE) -> GatedSAE:
    gated = as_gated(sae)
    gated.l1_coefficient = sae.l1_coefficient
    return gated


def test_latents_and_losses_are_those_of_the_gated_sae(
    sae: RescaleAndShiftSAE, x: torch.Tensor
) -> None:
    gated = gated_of(sae)
    assert torch.allclose(gated.encode(x), sae.encode(x), atol=1e-5)
    assert torch.allclose(gated(x), sae(x), atol=1e-5)
    ours, theirs = (each.objective(x).losses for each in (sae, gated))
    assert list(ours) == list(theirs)
    for name, loss in ours.items():
        assert loss.item() == pytest.approx(theirs[name].item(), rel=1e-5)


def test_gradients_are_those_of_the_gated_sae_times_the_jacobian(
    sae: RescaleAndShiftSAE, x: torch.Tensor
) -> None:
    gated = gated_of(sae)
    for each in (sae, gated):
        torch.stack(list(each.objective(x).losses.values())).sum().backward()
    of = {name: parameter.grad for name, parameter in gated.named_parameters()}
    through, scale = of["b_mag"], sae.r_mag.detach().exp()
    assert isinstance(through, torch.Tensor)
    # b_mag of the gated one is b_mag + exp(r_mag) b_enc.
    more = {"b_enc": scale * through, "r_mag": scale * sae.b_enc.detach() * through}
    for name, parameter in sae.named_parameters():
        theirs = of[name]
        assert isinstance(parameter.grad, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        assert torch.allclose(parameter.grad, theirs + more.get(name, 0.0), atol=1e-4), name


@torch.no_grad()
def test_negative_magnitudes_are_counted_and_are_all_that_differs(
    sae: RescaleAndShiftSAE, x: torch.Tensor
) -> None:
    variance = (x - x.mean(0)).square().sum()
    same = against_gated(sae, x.split(50))
    assert same["negative"] == 0
    error = (x - sae(x)).square().sum() / variance
    assert same["fvu_as_gated"] == pytest.approx(error.item(), rel=1e-4)
    sae.b_mag.fill_(-0.5)
    f = sae.encode(x)
    found = against_gated(sae, x.split(50))
    assert found["negative"] == pytest.approx(((f < 0).sum() / (f != 0).sum()).item())
    assert found["negative"] > 0.1
    without = (x - sae.decode(f.relu())).square().sum() / variance
    assert found["fvu_as_gated"] == pytest.approx(without.item(), rel=1e-4)
