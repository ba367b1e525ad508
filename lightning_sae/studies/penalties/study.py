"""The study of penalties: is the square root below and left of L1?"""

from typing import Any

from lightning_sae.functional.penalties import L1 as Absolute
from lightning_sae.functional.penalties import Log, Penalty, Power, Sqrt, Tanh, describe
from lightning_sae.studies.penalties.report import BIAS, draw, report
from lightning_sae.studies.shared.families import Family, chosen
from lightning_sae.studies.shared.frontier import (
    Curve,
    area_between,
    common_l0,
    l0_ratio,
    mean_over,
    share_below,
)
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.sweep import Answers, Swept, settings_of, train_all


def _family(name: str, label: str, penalty: Penalty, *coefficients: float) -> Family:
    arguments = {"penalty": describe(penalty)}
    return Family(name, label, "lightning_sae.ReLUSAE", coefficients, arguments)


FAMILIES = (
    _family("l1", "L1", Absolute(), 0.7, 1.0, 1.5, 2.2, 3.2, 4.5),
    _family("sqrt", "sqrt", Sqrt(), 0.25, 0.42, 0.7, 1.15, 1.8, 2.9),
    _family("log", "log(1 + f)", Log(), 0.5, 0.8, 1.3, 2.1, 3.2, 4.8),
    _family("tanh", "tanh(4 f)", Tanh(), 0.25, 0.42, 0.7, 1.15, 1.9, 3.1),
    _family("power", "f to the 0.75", Power(0.75), 0.33, 0.5, 0.8, 1.2, 1.9, 2.9),
)
"""The baseline and what is compared with it."""

NAMES = ",".join(family.name for family in FAMILIES)

QUALITIES = {"ce_spliced": "loss_recovered_mean", "mse": "explained_variance"}
"""Costs, and what rises in proportion as they fall: the L0 for a level of either is the same."""


def penalties(
    penalties: str = NAMES,
    coefficients: dict[str, list[float]] | None = None,
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2),
    tuning_steps: int = 300,
    d_sae: int = 512,
    steps: int = 800,
    batch_size: int = 1024,
    held_out_tokens: int = 32768,
    output: str = "runs/penalties",
    hook_name: str = "blocks.1.hook_resid_post",
    **common: Any,
) -> None:
    """Sweep ReLU SAEs with several sparsity penalties, and compare their curves against L0.

    Each penalty is given several weights, and all SAEs are trained side by side on one pass of the
    language model, with a learning rate for each penalty that is tuned first. Answered is whether
    a penalty's cross-entropy and squared error lie below L1's at equal L0, and left of them.
    Written are `results.json`, `results.csv`, `penalties.png` and `report.html`.

    Args:
        penalties: Which of l1, sqrt, log, tanh and power, with commas between them; l1 is what
            others are compared with and always there.
        coefficients: Weights by penalty; by default such as give L0 of about 4 to 60 on
            activations of width 128.
        learning_rates: One is chosen for each penalty.
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
    every = chosen(FAMILIES, penalties, coefficients, "penalties")
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
    answers = {family.name: against_l1(swept, family) for family in every[1:]}
    swept.present(setting, settings, answers, draw, report, "penalties")


def against_l1(swept: Swept, family: Family) -> Answers:
    """How a penalty's curves lie to those of L1, in each repetition.

    Returns:
        For `ce_spliced` and `mse`: `area_*`, between the curves over log L0; `gap_*`, their mean
        distance; `below_*`, the share of the common range where the penalty's is less;
        `l0_ratio_*`, L0 over that of L1 at equal cost; and `gap_low_*`, the mean distance in the
        lower half of the range. Then `gap_gamma`, of the relative reconstruction bias.
    """
    answers: Answers = {}

    def note(name: str, value: float | None) -> None:
        answers.setdefault(name, []).append(value)

    for seed in range(swept.seeds):
        for cost, quality in QUALITIES.items():
            own, l1 = (swept.curve(each, seed, cost) for each in (family, swept.families[0]))
            note(f"area_{cost}", _of_both(area_between, own, l1))
            note(f"gap_{cost}", _of_both(gap, own, l1))
            note(f"gap_low_{cost}", _of_both(gap_at_low_l0, own, l1))
            note(f"below_{cost}", _of_both(share_below, own, l1))
            own, l1 = (swept.curve(each, seed, quality) for each in (family, swept.families[0]))
            note(f"l0_ratio_{cost}", _of_both(l0_ratio, own, l1))
        own, l1 = (swept.curve(each, seed, BIAS) for each in (family, swept.families[0]))
        note("gap_gamma", _of_both(gap, own, l1))
    return answers


def _of_both(question: Any, own: Curve | None, l1: Curve | None) -> float | None:
    return None if own is None or l1 is None else question(own, l1)


def gap(curve: Curve, baseline: Curve, part: float = 1.0) -> float | None:
    """Mean of `curve` less `baseline` over the lower part of the log L0 that both have."""
    within = common_l0([curve, baseline])
    if within is None:
        return None
    lower = (within[0], within[0] + part * (within[1] - within[0]))
    return mean_over(curve, lower) - mean_over(baseline, lower)


def gap_at_low_l0(curve: Curve, baseline: Curve) -> float | None:
    """The same over the lower half."""
    return gap(curve, baseline, part=0.5)
