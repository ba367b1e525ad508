"""Analyses of trained SAEs."""

from lightning_sae.analysis.in_model import evaluate_all_in_model, evaluate_in_model
from lightning_sae.analysis.store import FeatureStore

__all__ = ["FeatureStore", "evaluate_all_in_model", "evaluate_in_model"]
