"""The paper's ablation: trained ReLU SAEs with frozen weights, rescaled and shifted.

Source: Rajamanoharan et al., Improving Dictionary Learning with Gated Sparse Autoencoders (2024),
section 5.2 and Figure 9, "baseline + rescale & shift".
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_sae.architectures import RescaleAndShiftSAE, SparseAutoencoder
from lightning_sae.studies.shared.evaluation import evaluate, scalars
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.rows import Row, select
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.sweep import Swept
from lightning_sae.studies.shared.training import train_together

FROZEN = Family(
    "frozen-rescale-shift",
    "Frozen ReLU, rescaled and shifted",
    "lightning_sae.RescaleAndShiftSAE",
    (),
)
TRAINED = ("r_mag", "b_mag")


@torch.no_grad()
def on_frozen(sae: SparseAutoencoder, **arguments: Any) -> RescaleAndShiftSAE:
    """A trained ReLU SAE whose only weights to train are a scale and a shift of each latent.

    Its loss is the squared error alone. It begins as the same function, and the same latents fire
    whatever it learns.

    Args:
        sae: A `ReLUSAE`.
        arguments: Arguments of `SparseAutoencoder`, as its learning rate.
    """
    without_penalty = {"l1_coefficient": 0.0, "auxiliary_coefficient": 0.0}
    own = {"apply_b_dec_to_input": sae.apply_b_dec_to_input, **without_penalty, **arguments}
    found = RescaleAndShiftSAE(sae.d_in, sae.d_sae, **own)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "input_mean", "input_scale"):
        getattr(found, name).copy_(getattr(sae, name))
    for name, weight in found.named_parameters():
        weight.requires_grad_(name in TRAINED)
    found.source, found.is_trained = dict(sae.source), True
    return found


def with_frozen(swept: Swept, saes: Mapping[int, Mapping[str, SparseAutoencoder]]) -> Swept:
    """The sweep with one more family: its baselines, frozen, rescaled and shifted.

    Each is trained for as many steps as its baseline was, with the same learning rate.

    Args:
        swept: The sweep; its first family is the baseline.
        saes: All SAEs of each seed, by name.
    """
    baseline = swept.families[0]
    family = replace(FROZEN, coefficients=baseline.coefficients)
    rows = [row for seed in saes for row in _of_seed(swept, saes[seed], family, seed)]
    return replace(swept, families=[*swept.families, family], rows=[*swept.rows, *rows])


def _of_seed(
    swept: Swept, saes: Mapping[str, SparseAutoencoder], family: Family, seed: int
) -> list[Row]:
    setting, folder = swept.setting, swept.folder / f"seed-{seed}" / "frozen"
    assert setting is not None
    baselines = select(swept.rows, family=swept.families[0].name, seed=seed)
    names = {f"{family.name}-{row['coefficient']}": row for row in baselines}
    members = [
        {
            "name": name,
            "sae": on_frozen(saes[swept.name(row)], **_schedule(setting, row["lr"])),
            "callbacks": [],
        }
        for name, row in names.items()
    ]
    copies = train_together(setting, folder, members, seed=seed)
    figures = evaluate(
        copies, setting.held_out(), setting.held_out_tokens, folder / "evaluation.json"
    )
    about = ("coefficient", "lr", "seed")
    return [
        {"family": family.name, **{key: row[key] for key in about}, **scalars(figures[name])}
        for name, row in names.items()
        if name in figures
    ]


def _schedule(setting: Setting, lr: float) -> dict[str, Any]:
    return {name: each for name, each in setting.arguments(lr=lr).items() if name != "d_sae"}
