"""Studies that reproduce published experiments; each is one command that trains and reports."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli

from lightning_sae.studies.broken_latents.study import broken_latents
from lightning_sae.studies.broken_latents_lm.study import broken_latents_lm
from lightning_sae.studies.gated.study import gated
from lightning_sae.studies.ground_truth.study import ground_truth
from lightning_sae.studies.low_activations.study import low_activations
from lightning_sae.studies.penalties.study import penalties
from lightning_sae.studies.rare_latents.study import rare_latents
from lightning_sae.studies.replication.study import replication
from lightning_sae.studies.suppression.study import suppression

STUDIES: dict[str, Any] = {
    "broken-latents": broken_latents,
    "broken-latents-lm": broken_latents_lm,
    "ground-truth": ground_truth,
    "gated": gated,
    "penalties": penalties,
    "low-activations": low_activations,
    "replication": replication,
    "rare-latents": rare_latents,
    "suppression": suppression,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-sae study NAME`; its arguments are those of the study's function."""
    auto_cli(STUDIES, args=list(args or []), prog="lightning-sae study", as_positional=False)
