"""The values used in a step: learning rate, coefficient, threshold; and the gradient's norm."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder


class StepMonitor(Callback):
    """Logs the values used in a step, together with its losses.

    `train/lr`, for further parameter groups `train/lr_1` and so on (thresholds, in a
    `JumpReLUSAE`); `train/gradient_norm`, before it is clipped; `train/coefficient` of the penalty
    with warm-up and `TargetL0`; `train/threshold`, in the units of the activations, the mean over
    latents if each has its own. Nothing is computed in steps that are not logged.
    """

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            groups = enumerate(optimizer.param_groups)
            rates = {f"lr_{i}" if i else "lr": group["lr"] for i, group in groups}
            found = {**rates, "gradient_norm": _norm(pl_module), **_in_force(pl_module)}
            pl_module.log_dict({f"train/{name}": value for name, value in found.items()})


def _norm(module: nn.Module) -> Tensor:
    if isinstance(module, SparseAutoencoder):
        return module.gradient_norm()
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    return nn.utils.get_total_norm(gradients)


@torch.no_grad()
def _in_force(module: LightningModule) -> dict[str, Any]:
    if not isinstance(module, SparseAutoencoder):
        return {}
    found: dict[str, Any] = {}
    if module.coefficient_name is not None:
        found["coefficient"] = module.weight_of_penalty()
    if "threshold" in module.latent_units:
        threshold: Any = module.threshold
        found["threshold"] = module.parts.mean((threshold.relu() / module.input_scale).mean())
    return found
