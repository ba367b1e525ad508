"""Questions asked of a trained SAE."""

from lightning_sae.analysis.in_model import evaluate_in_model as evaluate_in_model

__all__ = ["evaluate_in_model"]
