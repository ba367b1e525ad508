"""The source documents' experiments, each one command that trains, measures, draws and reports."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli

from lightning_sae.studies.broken_latents import broken_latents
from lightning_sae.studies.ground_truth import ground_truth
from lightning_sae.studies.language.gated import gated
from lightning_sae.studies.language.low_activations import low_activations
from lightning_sae.studies.language.penalties import penalties
from lightning_sae.studies.language.replication import replication
from lightning_sae.studies.language.suppression import suppression

STUDIES: dict[str, Any] = {
    "broken-latents": broken_latents,
    "ground-truth": ground_truth,
    "gated": gated,
    "penalties": penalties,
    "low-activations": low_activations,
    "replication": replication,
    "suppression": suppression,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-sae study NAME`; its arguments are those of the study's function."""
    auto_cli(STUDIES, args=list(args or []), prog="lightning-sae study", as_positional=False)
