"""The study of gating: do gated SAEs need fewer latents, and do they shrink less?"""

from collections.abc import Sequence
from typing import Any

from lightning_sae.studies.gated.report import BIAS, LEVEL, draw, report
from lightning_sae.studies.shared.families import Family, chosen
from lightning_sae.studies.shared.frontier import Curve, common_l0, l0_ratio, mean_over
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.sweep import Answers, Swept, settings_of, train_all

FAMILIES = (
    Family("relu", "ReLU, L1", "lightning_sae.ReLUSAE", (0.7, 1.0, 1.5, 2.2, 3.2, 4.5)),
    Family("gated", "Gated", "lightning_sae.GatedSAE", (1.0, 1.5, 2.2, 3.2, 4.5, 6.5)),
    Family(
        "gated-norms",
        "Gated, norms in penalty",
        "lightning_sae.GatedSAE",
        (1.0, 1.5, 2.2, 3.2, 4.5, 6.0),
        {"decoder_norm": "free"},
    ),
    Family(
        "rescale-shift",
        "Rescaled and shifted",
        "lightning_sae.RescaleAndShiftSAE",
        (1.1, 1.6, 2.4, 3.6, 5.2, 7.5),
    ),
    Family(
        "no-heaviside",
        "No Heaviside",
        "lightning_sae.RescaleAndShiftSAE",
        (1.5, 2.4, 3.8, 6.0, 9.5, 14.0),
        {"use_b_mag": False},
    ),
)
"""The baseline and what is compared with it."""

NAMES = ",".join(family.name for family in FAMILIES)


def gated(
    families: str = NAMES,
    coefficients: dict[str, list[float]] | None = None,
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2),
    tuning_steps: int = 300,
    d_sae: int = 512,
    steps: int = 800,
    batch_size: int = 1024,
    held_out_tokens: int = 32768,
    output: str = "runs/gated",
    hook_name: str = "blocks.1.hook_resid_post",
    **common: Any,
) -> None:
    """Sweep gated SAEs, their ablations and the ReLU baseline, and compare them at equal quality.

    Each family is trained at several weights of its penalty, all side by side on one pass of the
    language model, with a learning rate that is tuned first. Answered are: what share of the
    baseline's L0 a family needs for the same loss recovered, and its relative reconstruction bias.
    Written are `results.json`, `results.csv`, `gated.png` and `report.html`.

    Args:
        families: Which of relu, gated, gated-norms, rescale-shift and no-heaviside, with commas
            between them; relu is the baseline and always there.
        coefficients: Weights of the penalty by family; by default such as give L0 of about 3 to
            45 on activations of width 128, 11 to 47 for no-heaviside. For other widths they grow
            as the square root.
        learning_rates: One is chosen for each family.
        tuning_steps: Optimiser steps of the runs for that choice.
        d_sae: Latents of each SAE.
        steps: Optimiser steps of each SAE.
        batch_size: Activations in a step.
        held_out_tokens: Held-out tokens that every SAE is evaluated on.
        output: A new or empty folder, or that of this study with the same settings, which then
            goes on.
        hook_name: TransformerLens name of the hook.
        common: As for every study of a language model.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    every = chosen(FAMILIES, families, coefficients, "families")
    settings = settings_of(every, learning_rates, tuning_steps)
    setting = Setting(
        output,
        hook_name,
        d_sae=d_sae,
        steps=steps,
        batch_size=batch_size,
        held_out_tokens=held_out_tokens,
        lr=min(learning_rates),
        **common,
    )
    setting.open(**settings)
    swept = train_all(setting, every, learning_rates, tuning_steps)
    answers = {family.name: against_baseline(swept, family) for family in every}
    swept.present(setting, settings, answers, draw, report, "gated")


def against_baseline(swept: Swept, family: Family) -> Answers:
    """What a family needs and how it is biased, beside the baseline, in each repetition.

    Returns:
        `l0_ratio`, at equal loss recovered; `gamma` and `gamma_of_baseline`, means over the log L0
        that both have.
    """
    answers: Answers = {"l0_ratio": [], "gamma": [], "gamma_of_baseline": []}
    for seed in range(swept.seeds):
        pair = [swept.curve(each, seed, LEVEL) for each in (family, swept.families[0])]
        answers["l0_ratio"].append(None if None in pair else l0_ratio(*pair))  # type: ignore[arg-type]
        biases = [swept.curve(each, seed, BIAS) for each in (family, swept.families[0])]
        own, baseline = means_over_common(biases)
        answers["gamma"].append(own)
        answers["gamma_of_baseline"].append(baseline)
    return answers


def means_over_common(pair: Sequence[Curve | None]) -> tuple[float | None, float | None]:
    """Means of two curves over the log L0 that both have."""
    first, second = pair
    if first is None or second is None or (within := common_l0([first, second])) is None:
        return None, None
    return mean_over(first, within), mean_over(second, within)
