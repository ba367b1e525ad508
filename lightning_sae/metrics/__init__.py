"""torchmetrics of SAEs; the formulas are functions in `lightning_sae.functional`."""

from lightning_sae.metrics.held_out import held_out_metrics
from lightning_sae.metrics.reconstruction import (
    FVU,
    MSE,
    CosineSimilarity,
    ExplainedVariance,
    L2Ratio,
    RelativeReconstructionBias,
)
from lightning_sae.metrics.sparsity import L0, DeadFraction, FeatureFrequency, FrequencyBelow

__all__ = [
    "FVU",
    "L0",
    "MSE",
    "CosineSimilarity",
    "DeadFraction",
    "ExplainedVariance",
    "FeatureFrequency",
    "FrequencyBelow",
    "L2Ratio",
    "RelativeReconstructionBias",
    "held_out_metrics",
]
