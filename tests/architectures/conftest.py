"""What tests of architectures share; the package is imported inside fixtures only."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader


class Evaluated(NamedTuple):
    """An objective on a batch: its terms, its gradients, latents as a matrix, reconstruction."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    f: Tensor
    x_hat: Tensor

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@pytest.fixture
def evaluate() -> Callable[..., Evaluated]:
    """Evaluates a copy of an SAE in one of the layouts, wholly or one term of its loss."""
    from lightning_sae.functional.sparse.code import Layout

    def evaluate(sae: Any, x: Tensor, dense: bool = True, term: str | None = None) -> Evaluated:
        sae = copy.deepcopy(sae)
        sae.layout = Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))
        step = sae.objective(x)
        total = torch.stack([v for k, v in step.losses.items() if term in (None, k)]).sum()
        weights = {name: w for name, w in sae.named_parameters() if w.requires_grad}
        found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(weights[name]) if gradient is None else gradient
            for name, gradient in zip(weights, found, strict=True)
        }
        losses = {name: value.item() for name, value in step.losses.items()}
        return Evaluated(losses, gradients, step.f.to_dense().detach(), step.x_hat.detach())

    return evaluate


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compares two evaluations, to rounding."""

    def assert_same(found: Evaluated, expected: Evaluated) -> None:
        assert found.losses == pytest.approx(expected.losses)
        torch.testing.assert_close(found.gradients, expected.gradients)
        torch.testing.assert_close(found.f, expected.f)
        torch.testing.assert_close(found.x_hat, expected.x_hat)

    return assert_same


@pytest.fixture
def randomised() -> Callable[[Any], Any]:
    """Gives an SAE random weights in double precision, about a quarter of latents active."""

    def randomised(sae: Any) -> Any:
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.normal_()
            sae.b_enc.sub_(1.0)
        return sae.double()

    return randomised


@pytest.fixture
def fit() -> Callable[..., Trainer]:
    """Trains quietly on batches, a tensor [steps, batch, d_in] or something endless."""

    def fit(sae: Any, batches: Any, *callbacks: Callback, **flags: Any) -> Trainer:
        ckpt_path = flags.pop("ckpt_path", None)
        silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        flags = {**dict.fromkeys(silent, False), "accelerator": "cpu", **flags}
        if isinstance(batches, Tensor):
            flags = {"max_steps": len(batches), **flags}
            batches = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer = Trainer(callbacks=list(callbacks), **flags)
        trainer.fit(sae, batches, ckpt_path=ckpt_path)
        return trainer

    return fit
