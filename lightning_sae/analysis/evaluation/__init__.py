"""Evaluate latents as features: probing, absorption, compute, redundancy, stability."""

from lightning_sae.analysis.evaluation.command import evaluate
from lightning_sae.analysis.evaluation.figures import evaluate_saes, questions_of
from lightning_sae.analysis.evaluation.passages import Passage, read_passages
from lightning_sae.analysis.evaluation.table import flat

__all__ = ["Passage", "evaluate", "evaluate_saes", "flat", "questions_of", "read_passages"]
