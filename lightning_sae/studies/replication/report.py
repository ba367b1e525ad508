"""Files and the page of the study of replication."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

from lightning_sae.studies.replication.plots import (
    draw_cosines,
    draw_frequencies,
    draw_over_time,
    draw_shares,
)
from lightning_sae.studies.replication.settings import (
    CONSTRAINED,
    LABELS,
    PLAIN,
    RARE,
    WORDS,
    Results,
    members,
)
from lightning_sae.studies.replication.tables import (
    comparison,
    figures,
    frequencies,
    hooks_text,
    rare_latents,
    rare_text,
    time_text,
)
from lightning_sae.studies.shared.page import Page, Section, caution
from lightning_sae.studies.shared.rows import Row, distinct, select

SOURCE = (
    "Neel Nanda, Open Source Replication & Commentary on Anthropic's Dictionary Learning Paper "
    "(2023)"
)


def report(folder: Path, settings: Row, results: Results) -> Page:
    """The study's page.

    Args:
        folder: The study's, for pictures.
        settings: The study's.
        results: Of each seed.
    """
    rows = list(_rows(results))
    across = {name: across_seeds(results, name) for name in (PLAIN, CONSTRAINED)}
    plain = [{k: each[k] for k in ("figures", "latents", "rare")} for each in results]
    return Page(
        "Replication on an MLP layer",
        "What do SAEs on MLP activations recover, what does resampling do to latents that do not "
        "fire, and are ultra-rare latents all the same?",
        _method(results),
        {**settings, "seeds": len(results)},
        [
            Section("Reconstruction", [hooks_text(rows)], [figures(rows)]),
            Section(
                "Frequencies",
                [time_text(rows)],
                [frequencies(rows)],
                {draw_frequencies(results, folder / "frequencies.png"): FREQUENCIES},
            ),
            Section(
                "Over training",
                pictures={
                    draw_over_time(results, folder / "over_time.png"): OVER_TIME,
                    draw_shares(results, folder / "shares.png"): SHARES,
                },
            ),
            Section(
                "The rare latents",
                [rare_text(rows)],
                [rare_latents(rows, across)],
                {draw_cosines(results, folder / "cosines.png"): COSINES},
            ),
        ],
        comparison(rows, across),
        SOURCE,
        {"settings": settings, "seeds": plain, "rare_mean_across_seeds": across},
        {"members": rows, "frequencies": list(_frequency_rows(results))},
        caution({LABELS[name]: select(rows, sae=name) for name in distinct(rows, "sae")}),
    )


FREQUENCIES = "Frequencies at the end of training, mean over seeds; logarithmic above 10 latents."
OVER_TIME = (
    "How many latents fire how often, in the first seed, on the activations of the last windows up "
    "to each step. Dashed: 1e-4 and 1e-5. The lowest row never fired."
)
SHARES = "Shares of rare latents over training; means over seeds, bars one standard deviation."
COSINES = (
    "Of rare latents and the others, all seeds together: cosines with the mean direction of the "
    "rare, and of encoder with decoder."
)


def _method(results: Results) -> list[str]:
    counted = results[0]["latents"][PLAIN]["activations_counted"]
    return [
        "ReLU SAEs with an L1 penalty are trained side by side on the activations of one MLP: "
        "without resampling, with rare latents re-initialised at random, and with dead latents set "
        "to inputs drawn by their squared loss; and one on the MLP's output. Decoder rows are kept "
        "at norm 1 by projecting their gradient and by resetting their norm.",
        f"A latent is rare if it fires on less than {WORDS[RARE]} of the last {counted:,.0f} "
        f"training activations{_too_few(counted)}. Where there are rare latents without "
        "resampling, another SAE is trained on the same activations, its encoder and decoder rows "
        "kept orthogonal to the mean of their encoder rows.",
        "Loss recovered is given against zero and mean ablation, on held-out text.",
    ]


def _too_few(counted: float) -> str:
    """A remark if frequencies below a level cannot be told from zero."""
    unseen = [words for level, words in WORDS.items() if level * counted <= 1]
    return f"; with so few, below {' and below '.join(unseen)} means never" if unseen else ""


def across_seeds(results: Results, name: str) -> list[float]:
    """Cosine of the rare latents' mean encoder directions, for each pair of seeds."""
    directions = [
        np.array(each["per_latent"][name]["rare_direction"])
        for each in results
        if name in each["per_latent"] and any(each["per_latent"][name]["rare"])
    ]
    return [float(one @ other) for one, other in combinations(directions, 2)]


def _rows(results: Results) -> Iterator[Row]:
    """All figures of each SAE and seed; what an SAE does not have is left out."""
    for seed, each in enumerate(results):
        for name in LABELS:
            if name in each["figures"]:
                figures = dict(each["figures"][name])
                scale = figures["ce_zero_ablation"] - figures["ce_clean"]
                kept = figures["ce_zero_ablation"] - figures["ce_mean_ablation"]
                figures["mean_ablation_recovers"] = kept / scale if scale else None
                latents, rare = each["latents"].get(name, {}), each["rare"].get(name, {})
                yield {"seed": seed, "sae": name, **figures, **latents, **rare}


def _frequency_rows(results: Results) -> Iterator[Row]:
    for seed, each in enumerate(results):
        for name in members([each]):
            snapshots = each["snapshots"][name]
            for step, n, counts in zip(
                snapshots.steps.tolist(), snapshots.n.tolist(), snapshots.counts, strict=True
            ):
                quartiles = np.quantile(counts.numpy() / n, (0.25, 0.5, 0.75))
                yield {
                    "seed": seed,
                    "sae": name,
                    "step": step,
                    "activations": n,
                    "never": float((counts == 0).double().mean()),
                    "lower_quartile": quartiles[0],
                    "median": quartiles[1],
                    "upper_quartile": quartiles[2],
                }
