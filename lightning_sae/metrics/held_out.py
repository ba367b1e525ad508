"""The metrics that an SAE reports on held-out activations."""

from torchmetrics import MetricCollection

from lightning_sae.metrics.reconstruction import (
    FVU,
    MSE,
    CosineSimilarity,
    ExplainedVariance,
    L2Ratio,
    RelativeReconstructionBias,
)
from lightning_sae.metrics.sparsity import L0, DeadFraction, FeatureFrequency, FrequencyBelow


def held_out_metrics(d_in: int, d_sae: int) -> MetricCollection:
    """The metrics of an SAE, updated by `update(x=x, x_hat=x_hat, f=f)`.

    All are scalars except `frequency`, of shape `[d_sae]`. Metrics with equal states share them.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch
        >>> metrics = held_out_metrics(d_in=2, d_sae=3)
        >>> x, f = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.eye(3)[:2]
        >>> metrics.update(x=x, x_hat=0.5 * x, f=f)
        >>> values = metrics.compute()
        >>> values["l0"], values["l2_ratio"]
        (tensor(1., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    return MetricCollection(
        {
            "l0": L0(),
            "mse": MSE(),
            "fvu": FVU(d_in),
            "explained_variance": ExplainedVariance(d_in),
            "l2_ratio": L2Ratio(),
            "relative_reconstruction_bias": RelativeReconstructionBias(),
            "cosine_similarity": CosineSimilarity(),
            "dead_fraction": DeadFraction(d_sae),
            "frequency_below_1e-5": FrequencyBelow(d_sae, threshold=1e-5),
            "frequency_below_1e-4": FrequencyBelow(d_sae, threshold=1e-4),
            "frequency": FeatureFrequency(d_sae),
        }
    )
