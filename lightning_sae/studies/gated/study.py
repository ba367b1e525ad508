"""The study of gating: do gated SAEs need fewer latents, and do they shrink activations less?"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.loading import load
from lightning_sae.studies.gated.equivalence import equivalence
from lightning_sae.studies.gated.frozen import with_frozen
from lightning_sae.studies.gated.report import LEVEL, report
from lightning_sae.studies.shared.families import CALLBACKS, Family
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.frontier import l0_ratio, mean_over_common
from lightning_sae.studies.shared.rows import Row, select
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
    Family(
        "gated-no-auxiliary",
        "Gated, no auxiliary loss",
        "lightning_sae.GatedSAE",
        (0.1, 0.3, 1.0, 3.0),
        {"auxiliary_coefficient": 0.0},
    ),
    Family(
        "rescale-shift-no-auxiliary",
        "Rescaled and shifted, no auxiliary loss",
        "lightning_sae.RescaleAndShiftSAE",
        (0.1, 0.3, 1.0, 3.0),
        {"auxiliary_coefficient": 0.0},
    ),
)
"""The baseline and the families compared with it."""

OF_THE_PAPER = ",".join(family.name for family in FAMILIES[:5])

RESAMPLING = {
    "class_path": f"{CALLBACKS}.DeadFeatureResampling",
    "init_args": {"every_n_steps": 0.15, "stop_after_step": 0.75},
}
"""Dead latents are set to inputs drawn by their squared loss, at shares of the run."""


def gated(
    families: str = OF_THE_PAPER,
    resampling: bool = False,
    frozen: bool = False,
    output: str = "runs/gated",
    **common: Any,
) -> None:
    """Sweep gated SAEs, their ablations and the ReLU baseline, and compare them at equal quality.

    Each family is trained at several weights of its penalty, all side by side on one pass of the
    language model, with a learning rate that is tuned first. The study answers what share of the
    baseline's L0 a family needs for the same loss recovered, and what its relative reconstruction
    bias is. It writes `results.json`, `results.csv`, `gated.png` and `report.html`. The default
    coefficients give an L0 of about 3 to 45 on activations of width 128, 11 to 47 for no-heaviside;
    for other widths they should grow as the square root.

    Args:
        families: Which of relu, gated, gated-norms, rescale-shift, no-heaviside,
            gated-no-auxiliary and rescale-shift-no-auxiliary, with commas between them; relu is
            the baseline and always has to be among them.
        resampling: Whether dead latents are resampled, as in the paper: set to inputs drawn by
            their squared loss after every 15 % of the run until 75 %.
        frozen: Whether each trained ReLU SAE also gets a scale and a shift of each latent, which
            are trained alone, by the squared error, for as many steps: the paper's "baseline +
            rescale & shift".
        output: A new or empty folder, or that of this study with the same settings, which then
            resumes.
        common: As for every sweep; see `train_families`.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    more = (RESAMPLING,) if resampling else ()
    kinds = [replace(family, callbacks=more) for family in FAMILIES]
    swept = train_families(
        kinds, families, "families", output, settings={"resampling": resampling}, **common
    )
    if frozen:
        swept = with_frozen(swept, {seed: _saes(swept, seed) for seed in range(swept.seeds)})
    answers = {family.name: against_baseline(swept, family) for family in swept.families}
    swept.publish(answers, report(swept, answers, _as_gated(swept)))


def _saes(swept: Swept, seed: int) -> dict[str, SparseAutoencoder]:
    """All SAEs of a seed by name."""
    folder = swept.folder / f"seed-{seed}" / "saes"
    return {path.name: load(path) for path in sorted(folder.iterdir())}


def _as_gated(swept: Swept) -> list[Row]:
    """Each rescaled and shifted SAE beside the gated one that it equals up to a ReLU."""
    found: list[Row] = []
    for seed in range(swept.seeds):
        part = swept.folder / f"seed-{seed}"
        compute = partial(_equivalence, swept, part / "saes")
        each = computed_once(part / "as_gated.json", compute)
        for name, figures in each.items():
            (row,) = [row for row in select(swept.rows, seed=seed) if swept.name(row) == name]
            own = {key: row[key] for key in ("seed", "family", "coefficient", "l0", "fvu")}
            found.append(own | figures)
    return found


def _equivalence(swept: Swept, saes: Path) -> dict[str, Any]:
    return equivalence(saes, swept.held_out())


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
