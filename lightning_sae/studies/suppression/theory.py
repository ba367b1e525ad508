r"""How much an L1 penalty shrinks a feature: by theory, and in SAEs trained on toy features.

A binary feature of strength g, orthogonal to all others, with its own latent: an activation a
costs :math:`p\,[(g - a)^2 + \lambda a]`, which is least at :math:`a = g - \lambda / 2`, or at 0 if
that is negative. The frequency p is a factor of both terms and drops out.
"""

import sys
from pathlib import Path

import torch

from lightning_sae.architectures import ReLUSAE
from lightning_sae.callbacks import DecoderNormProjection
from lightning_sae.data import ToyDataModule
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.rows import Row
from lightning_sae.studies.shared.toy_training import train_on_toy

STRENGTHS = (0.2, 0.4, 0.75, 1.25, 2.0, 3.0)
FREQUENCIES = (0.02, 0.05, 0.1, 0.2)
COEFFICIENTS = (0.5, 1.0, 2.0)
BATCH_SIZE = 1024
NOISE = 0.05
"""Standard deviation of the noise on each entry of the initial directions."""


def shrunk(strength: float, l1_coefficient: float) -> float:
    """The activation at which a feature of this strength is learnt.

    Example:
        >>> shrunk(2.0, 1.0), shrunk(0.4, 1.0)
        (1.5, 0.0)
    """
    return max(0.0, strength - l1_coefficient / 2)


def world(seed: int) -> ToyDataModule:
    """Orthogonal binary features of all strengths at all frequencies."""
    pairs = [(g, p) for g in STRENGTHS for p in FREQUENCIES]
    return ToyDataModule(
        len(pairs),
        len(pairs),
        magnitudes=[g for g, _ in pairs],
        probabilities=[p for _, p in pairs],
        batch_size=BATCH_SIZE,
        seed=seed,
    )


def shrunk_features(seed: int, steps: int, path: Path) -> list[Row]:
    """Features of the world as SAEs of several coefficients learn them; computed once.

    Returns:
        A row for each coefficient and feature: `strength`, `frequency`, `predicted`, and `learnt`,
        the strength at which the SAE reconstructs the feature alone.
    """

    def rows() -> list[Row]:
        sys.stderr.write(f"toy features: {len(COEFFICIENTS)} SAEs of {steps:,} steps\n")
        found = [row for each in COEFFICIENTS for row in _learnt(seed, steps, each)]
        return [{"seed": seed, **row} for row in found]

    return list(computed_once(path, rows))


def _learnt(seed: int, steps: int, l1_coefficient: float) -> list[Row]:
    toy = world(seed)
    sae = _trained(toy, seed, steps, l1_coefficient)
    alone = toy.magnitudes.unsqueeze(-1) * toy.features
    with torch.no_grad():
        learnt = (sae(alone) * toy.features).sum(-1).tolist()
    features = zip(toy.magnitudes.tolist(), toy.probabilities.tolist(), learnt, strict=True)
    return [
        {
            "l1_coefficient": l1_coefficient,
            "strength": strength,
            "frequency": frequency,
            "predicted": shrunk(strength, l1_coefficient),
            "learnt": value,
        }
        for strength, frequency, value in features
    ]


def _trained(toy: ToyDataModule, seed: int, steps: int, l1_coefficient: float) -> ReLUSAE:
    """An SAE without a decoder bias, with a latent for each feature that starts near it."""
    sae = ReLUSAE(
        toy.d_in,
        toy.n_features,
        l1_coefficient,
        lr=3e-3,
        lr_warmup_steps=0,
        lr_decay_steps=steps // 2,
        clip_grad_norm=None,  # clipping would weight batches by how many features fire
        b_dec_init="zero",
        apply_b_dec_to_input=False,
    )
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(toy.features.shape, generator=generator)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(toy.features + noise, dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.requires_grad_(False)  # not in the theory; it would learn a part of the mean
    train_on_toy(sae, toy, steps, [DecoderNormProjection()])
    return sae
