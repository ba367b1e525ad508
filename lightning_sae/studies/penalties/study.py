"""The study of penalties: is the square root below and left of L1?"""

from typing import Any

from lightning_sae.functional.penalties import L1 as Absolute
from lightning_sae.functional.penalties import Log, Penalty, Power, Sqrt, Tanh, describe
from lightning_sae.studies.penalties.report import report
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.frontier import (
    area_between,
    gap,
    gap_at_low_l0,
    l0_ratio,
    share_below,
)
from lightning_sae.studies.shared.sweep import BIAS, Answers, Swept, train_families


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
"""The baseline and the penalties compared with it."""

NAMES = ",".join(family.name for family in FAMILIES)

QUALITIES = {"ce_spliced": "loss_recovered_mean", "mse": "explained_variance"}
"""Costs, each with a figure that is linear in it, so that L0 at equal levels is the same."""


def penalties(penalties: str = NAMES, output: str = "runs/penalties", **common: Any) -> None:
    """Sweep ReLU SAEs with several sparsity penalties, and compare their curves against L0.

    Each penalty is given several weights, and all SAEs are trained side by side on one pass of the
    language model, with a learning rate for each penalty that is tuned first. The study answers
    whether a penalty's cross-entropy and squared error lie below L1's at equal L0, and left of
    them. It writes `results.json`, `results.csv`, `penalties.png` and `report.html`. The default
    coefficients give an L0 of about 4 to 60 on activations of width 128.

    Args:
        penalties: Which of l1, sqrt, log, tanh and power, with commas between them; l1 is the
            baseline and always has to be among them.
        output: A new or empty folder, or that of this study with the same settings, which then
            resumes.
        common: As for every sweep; see `train_families`.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    swept = train_families(FAMILIES, penalties, "penalties", output, **common)
    answers = {family.name: against_l1(swept, family) for family in swept.families[1:]}
    swept.publish(answers, report(swept, answers))


def against_l1(swept: Swept, family: Family) -> Answers:
    """Where a penalty's curves lie relative to those of L1.

    Returns:
        By seed, for `ce_spliced` and `mse`: `area_*`, between the curves over log L0; `gap_*`,
        their mean distance; `gap_low_*`, the same in the lower half of the range; `below_*`, the
        share of the common range where the penalty's is less; `l0_ratio_*`, L0 over that of L1 at
        equal cost. Then `gap_gamma`, of the relative reconstruction bias.
    """
    answers: Answers = {}
    for cost, quality in QUALITIES.items():
        answers[f"area_{cost}"] = swept.compare(family, cost, area_between)
        answers[f"gap_{cost}"] = swept.compare(family, cost, gap)
        answers[f"gap_low_{cost}"] = swept.compare(family, cost, gap_at_low_l0)
        answers[f"below_{cost}"] = swept.compare(family, cost, share_below)
        answers[f"l0_ratio_{cost}"] = swept.compare(family, quality, l0_ratio)
    return answers | {"gap_gamma": swept.compare(family, BIAS, gap)}
