import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sae import ReLUSAE
from lightning_sae.callbacks import DecoderNormProjection
from lightning_sae.studies.shared.toy_training import quiet


def naive_loss(sae: ReLUSAE, x: Tensor) -> float:
    """The objective one example, one latent at a time."""
    total = 0.0
    for row in x.tolist():
        seen = [
            a - b * sae.apply_b_dec_to_input for a, b in zip(row, sae.b_dec.tolist(), strict=True)
        ]
        x_hat = sae.b_dec.tolist()
        for j in range(sae.d_sae):
            pre = (
                sum(s * w for s, w in zip(seen, sae.W_enc[:, j].tolist(), strict=True))
                + sae.b_enc[j].item()
            )
            f = max(pre, 0.0)
            x_hat = [a + f * w for a, w in zip(x_hat, sae.W_dec[j].tolist(), strict=True)]
            norm = math.hypot(*sae.W_dec[j].tolist()) if sae.decoder_norm == "free" else 1.0
            total += sae.l1_coefficient * f * norm
        total += sum((a - b) ** 2 for a, b in zip(x_hat, row, strict=True))
    return total / len(x)


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_objective_is_squared_error_plus_penalty(
    decoder_norm: Any, apply_b_dec_to_input: bool
) -> None:
    sae = ReLUSAE(3, 5, 0.7, decoder_norm=decoder_norm, apply_b_dec_to_input=apply_b_dec_to_input)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 3)
    losses = sae.objective(x).losses
    assert sum(losses.values()).item() == pytest.approx(naive_loss(sae, x), rel=1e-5)  # type: ignore


def test_encoder_starts_as_the_decoders_transpose_with_unit_rows() -> None:
    sae = ReLUSAE(6, 10)
    assert torch.equal(sae.W_enc.T, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(10))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (0, 3)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    sae = ReLUSAE(3, 7)
    x = torch.randn(shape)
    assert sae.encode(x).shape == (*shape[:-1], 7)
    assert sae(x).shape == shape
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)))


def test_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="`l1_coefficient` to be at least 0 but got -1"):
        ReLUSAE(3, 5, l1_coefficient=-1.0)


class OneFeature:
    """One binary feature of strength `g` and frequency `p` along a direction, without end."""

    def __init__(self, g: float, p: float, direction: Tensor) -> None:
        self.g, self.p, self.direction = g, p, direction
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> "OneFeature":
        return self

    def __next__(self) -> Tensor:
        fires = torch.rand(256, 1, generator=self.generator) < self.p
        return self.g * fires * self.direction


def train_on_one_feature(g: float, p: float, l1_coefficient: float) -> float:
    """What the one latent of an SAE gives for the feature, once trained.

    `b_dec` stays at the origin, as in the closed form. The latent starts in the half space of the
    feature, for one that starts in the other never fires; else it has to find the direction.
    """
    direction = torch.nn.functional.normalize(torch.randn(4), dim=0)
    sae = ReLUSAE(4, 1, l1_coefficient, lr=0.03, b_dec_init="zero", lr_decay_steps=100)
    sae.b_dec.requires_grad_(False)
    with torch.no_grad():
        side = torch.sign(sae.W_dec @ direction).item()
        sae.W_dec.mul_(side)
        sae.W_enc.mul_(side)
    with quiet():
        trainer = Trainer(
            max_steps=300,
            callbacks=[DecoderNormProjection()],
            accelerator="cpu",
            barebones=True,
            limit_val_batches=0,
        )
        trainer.fit(sae, OneFeature(g, p, direction))  # type: ignore[arg-type]
    return sae.encode(g * direction).item()


@pytest.mark.parametrize("l1_coefficient", [0.3, 1.0])
@pytest.mark.parametrize("p", [0.05, 0.4])
@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_a_feature_of_strength_g_is_learnt_as_g_less_half_the_coefficient(
    l1_coefficient: float, p: float
) -> None:
    """Closed form of feature suppression: whatever the frequency, half the coefficient is lost."""
    learnt = train_on_one_feature(2.0, p, l1_coefficient)
    assert learnt == pytest.approx(2.0 - l1_coefficient / 2, rel=0.02)


@pytest.mark.usefixtures("unchecked")
def test_a_feature_weaker_than_half_the_coefficient_is_killed() -> None:
    assert train_on_one_feature(0.4, 0.3, l1_coefficient=1.0) < 1e-3
