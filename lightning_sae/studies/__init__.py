"""The source documents' experiments, each one command that trains, measures, draws and reports."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli

from lightning_sae.studies.broken_latents import broken_latents
from lightning_sae.studies.ground_truth import ground_truth

STUDIES: dict[str, Any] = {"broken-latents": broken_latents, "ground-truth": ground_truth}


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-sae study NAME`; its arguments are those of the study's function."""
    auto_cli(STUDIES, args=list(args or []), prog="lightning-sae study", as_positional=False)
