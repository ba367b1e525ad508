"""Questions asked of a trained SAE."""

from lightning_sae.analysis.in_model import evaluate_all_in_model, evaluate_in_model

__all__ = ["evaluate_all_in_model", "evaluate_in_model"]
