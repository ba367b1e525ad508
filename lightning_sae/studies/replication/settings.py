"""The SAEs of the study of replication, and what counts as rare."""

from collections.abc import Mapping, Sequence
from typing import Any

PLAIN, REINITIALIZE, LOSS_SQUARED = "none", "reinitialize", "loss_squared"
CONSTRAINED, OUT, PRUNED = "constrained", "mlp_out", "none_without_rare"
LABELS = {
    PLAIN: "no resampling",
    REINITIALIZE: "resampling, random directions",
    LOSS_SQUARED: "resampling, by squared loss",
    CONSTRAINED: "orthogonal to the rare direction",
    OUT: "MLP output, no resampling",
    PRUNED: "no resampling, rare latents removed",
}
RARE, RAREST = 1e-4, 1e-5
WORDS = {RARE: "1e-4", RAREST: "1e-5"}
FINAL_WINDOWS = 5  # snapshots whose counts are summed for a frequency, since one has few firings
WINDOW = 0.05  # share of a run in a snapshot of the frequencies
RESAMPLE_EVERY, RESAMPLE_UNTIL = 0.15, 0.75  # shares of a run

Results = Sequence[Mapping[str, Any]]
"""Of each seed: `figures`, `latents`, `rare` and `per_latent` by SAE, and `snapshots`."""


def members(results: Results) -> list[str]:
    """The SAEs that some seed has, in the order of `LABELS`."""
    return [name for name in LABELS if any(name in each["snapshots"] for each in results)]
