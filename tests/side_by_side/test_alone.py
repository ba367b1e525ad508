"""Each member's weights are those it would have if it were trained alone on the same batches."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TiedSAE
from lightning_sae.callbacks import (
    AuxThresholdWarmup,
    DeadFeatureResampling,
    DecoderNormProjection,
    L1Warmup,
    OrthogonalTo,
    TargetL0,
)
from lightning_sae.side_by_side import SideBySide

# Runs are too short for a target.
pytestmark = pytest.mark.filterwarnings("ignore:`TargetL0` did not reach its target")

D_IN, D_SAE, BATCH, STEPS = 6, 24, 16, 12


class Case(NamedTuple):
    """A member: its architecture, arguments, callbacks and seed."""

    kind: Any
    arguments: dict[str, Any]
    callbacks: Callable[[], list[Callback]]
    seed: int = 0

    def build(self) -> Any:
        torch.manual_seed(self.seed)
        rates = {"lr": 0.02, "lr_warmup_steps": 3, "lr_decay_steps": 4, "clip_grad_norm": 0.5}
        return self.kind(D_IN, D_SAE, **{**rates, "dead_after": 3 * BATCH, **self.arguments})


CASES = {
    "relu": Case(
        ReLUSAE,
        {"l1_coefficient": 0.3},
        lambda: [
            OrthogonalTo(torch.eye(D_IN)[0]),
            DecoderNormProjection(),
            L1Warmup(5),
            DeadFeatureResampling(4, n_inputs=40),
        ],
    ),
    "relu-free": Case(ReLUSAE, {"l1_coefficient": 0.1, "decoder_norm": "free"}, lambda: [], 1),
    "gated": Case(
        GatedSAE,
        {"l1_coefficient": 0.2},
        lambda: [DecoderNormProjection(), L1Warmup(4), TargetL0(3)],
        2,
    ),
    "jumprelu": Case(
        JumpReLUSAE,
        {"l0_coefficient": 0.05},
        lambda: [DecoderNormProjection(), TargetL0(4), DeadFeatureResampling(5, "reinitialize")],
    ),
    "batch-topk": Case(
        BatchTopKSAE, {"k": 3, "revive": "auxk"}, lambda: [DecoderNormProjection()], 3
    ),
    "matryoshka": Case(
        MatryoshkaSAE, {"k": 3, "prefixes": (4, 12, D_SAE)}, lambda: [DecoderNormProjection()]
    ),
    "tied": Case(
        TiedSAE,
        {"l1_coefficient": 0.1, "orthogonality_coefficient": 10.0},
        lambda: [DecoderNormProjection(), AuxThresholdWarmup(3, 4)],
    ),
}


@pytest.fixture
def batches() -> Tensor:
    """Twelve steps' batches, for one or two micro-batches each."""
    return torch.randn(2 * STEPS, BATCH, D_IN) * torch.rand(D_IN) + 0.3


def fit(module: Any, batches: Tensor, *callbacks: Callback, **flags: Any) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "accelerator": "cpu", "max_steps": STEPS, **flags}
    trainer = Trainer(callbacks=list(callbacks), **flags)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


def outcome(sae: Any, trainer: Trainer, callbacks: list[Callback]) -> dict[str, Any]:
    """All that training leaves behind."""
    return {
        "weights": dict(sae.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callbacks": [callback.state_dict() for callback in callbacks],
        "scales": (sae.penalty_scale, sae.penalty_factor),
        "step": trainer.global_step,
    }


def assert_equal(found: Any, expected: Any) -> None:
    """Bit for bit, at any depth."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


# Annotations, executed for the same calls by the tests of each part, would take most of the time.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "flags",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=str,
)
def test_each_member_is_what_it_would_be_alone(batches: Tensor, flags: dict[str, Any]) -> None:
    described: list[dict[str, Any]] = [
        {"name": name, "sae": case.build(), "callbacks": case.callbacks()}
        for name, case in CASES.items()
    ]
    together = SideBySide(described)
    trainer = fit(together, batches, **flags)
    assert trainer.global_step == STEPS
    for member, case in zip(together.members, CASES.values(), strict=True):
        sae, callbacks = case.build(), case.callbacks()
        start = copy.deepcopy(sae.state_dict())
        alone = fit(sae, batches, *callbacks, **flags)
        assert not torch.equal(start["W_dec"], sae.W_dec)
        given = member.callbacks[: len(callbacks)]  # without what SAEs bring along
        found = outcome(member.sae, member.trainer, given)
        assert_equal(found, outcome(sae, alone, callbacks))
