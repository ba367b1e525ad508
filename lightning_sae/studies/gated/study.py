"""The study of gating: do gated SAEs need fewer latents, and do they shrink activations less?"""

from typing import Any

from lightning_sae.studies.gated.report import LEVEL, report
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.frontier import l0_ratio, mean_over_common
from lightning_sae.studies.shared.sweep import BIAS, Answers, Swept, train_families

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
"""The baseline and the families compared with it."""

NAMES = ",".join(family.name for family in FAMILIES)


def gated(families: str = NAMES, output: str = "runs/gated", **common: Any) -> None:
    """Sweep gated SAEs, their ablations and the ReLU baseline, and compare them at equal quality.

    Each family is trained at several weights of its penalty, all side by side on one pass of the
    language model, with a learning rate that is tuned first. The study answers what share of the
    baseline's L0 a family needs for the same loss recovered, and what its relative reconstruction
    bias is. It writes `results.json`, `results.csv`, `gated.png` and `report.html`. The default
    coefficients give an L0 of about 3 to 45 on activations of width 128, 11 to 47 for no-heaviside;
    for other widths they should grow as the square root.

    Args:
        families: Which of relu, gated, gated-norms, rescale-shift and no-heaviside, with commas
            between them; relu is the baseline and always has to be among them.
        output: A new or empty folder, or that of this study with the same settings, which then
            resumes.
        common: As for every sweep; see `train_families`.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    swept = train_families(FAMILIES, families, "families", output, **common)
    answers = {family.name: against_baseline(swept, family) for family in swept.families}
    swept.publish(answers, report(swept, answers))


def against_baseline(swept: Swept, family: Family) -> Answers:
    """L0 and reconstruction bias of a family, compared with the baseline.

    Returns:
        By seed: `l0_ratio`, at equal loss recovered; `gamma` and `gamma_of_baseline`, means over
        the log L0 that both have.
    """
    return {
        "l0_ratio": swept.compare(family, LEVEL, l0_ratio),
        "gamma": swept.compare(family, BIAS, mean_over_common),
        "gamma_of_baseline": swept.compare(
            family, BIAS, lambda own, baseline: mean_over_common(baseline, own)
        ),
    }
