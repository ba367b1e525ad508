"""Descriptions, sweeps, logs, and members that stop."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE, SideBySide, TopKSAE
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup

RELU = {"class_path": "lightning_sae.ReLUSAE", "init_args": {"d_sae": 12, "l1_coefficient": 0.1}}
NORM = {"class_path": "lightning_sae.callbacks.DecoderNormProjection"}


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        if values:
            self.rows.append((step, values))

    def log_hyperparams(self, *_: Any) -> None:
        pass


def fit(module: Any, batches: Tensor, *callbacks: Any, **flags: Any) -> Trainer:
    silent = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    flags = {**dict.fromkeys(silent, False), "max_steps": len(batches), **flags}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **flags)
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader if "limit_val_batches" in flags else None)
    return trainer


def relu(**arguments: Any) -> ReLUSAE:
    torch.manual_seed(0)
    settings = {"d_sae": 12, "l1_coefficient": 0.1, "decoder_norm": "free", **arguments}
    return ReLUSAE(4, **settings)


def test_a_sweep_means_each_combination_with_weights_of_its_seed() -> None:
    sweep = {"seed": [5, 6], "lr": [1e-3, 2e-3]}
    model = SideBySide([{"name": "a", "sae": RELU, "sweep": sweep}], d_in=4)
    assert [member.name for member in model.members] == [
        f"a-seed={seed}-lr={lr}" for seed in (5, 6) for lr in (0.001, 0.002)
    ]
    for seed in (5, 6):
        torch.manual_seed(seed)
        expected = ReLUSAE(4, 12)
        for lr in (0.001, 0.002):
            sae = model[f"a-seed={seed}-lr={lr}"]
            assert sae.lr == lr
            assert torch.equal(sae.W_dec, expected.W_dec)


def test_without_a_seed_weights_are_those_of_the_run_s_seed() -> None:
    torch.manual_seed(7)
    expected = ReLUSAE(4, 12)
    torch.manual_seed(7)
    members = [{"name": name, "sae": RELU} for name in "ab"]
    model = SideBySide(members, d_in=4)
    assert torch.equal(model["a"].W_dec, expected.W_dec)
    assert torch.equal(model["b"].W_dec, expected.W_dec)


def test_members_of_one_size_share_their_scratch_memory() -> None:
    sizes = {"a": 12, "b": 12, "c": 16}
    members = [{"name": name, "sae": relu(d_sae=d_sae)} for name, d_sae in sizes.items()]
    model = SideBySide(members)
    for member in model.members:
        member.sae.layout.dense = False
        member.sae.layout.thresholds = (-1.0, 2.0)  # it stays so
    fit(model, torch.randn(3, 8, 4))
    scratch = {
        name: model[name].layout.workspace.scratch(8, d_sae, torch.zeros(1)).data_ptr()
        for name, d_sae in sizes.items()
    }
    assert scratch["a"] == scratch["b"] != scratch["c"]


SHARED = relu()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one member"),
        ([{"name": "a", "sae": RELU}] * 2, "several are called `a`: rename"),
        ([{"name": "a/b", "sae": RELU}], "letters, digits and .* but got `a/b`"),
        ([{"name": "a", "sae": RELU, "hook": "x"}], r"Member `a`: .* \['hook'\] unknown"),
        ([{"name": "a"}], r"Member `a`: .* \['sae'\] are missing"),
        ([{"name": "a", "sae": RELU, "sweep": {"lr": 0.1}}], "Member `a`: Expected `sweep` to"),
        ([{"name": "a", "sae": RELU, "sweep": {"lr": []}}], "Member `a`: Expected `sweep` to"),
        ([{"name": "a", "sae": RELU, "sweep": {"l2": [1]}}], "Member `a-l2=1`: .*l2"),
        ([{"name": "a", "sae": RELU, "sweep": {"d_sae": [-1]}}], "Member `a-d_sae=-1`: .*d_sae"),
        ([{"name": "a", "sae": {"class_path": "no.SAE"}}], r"Member `a`: .*no\.SAE"),
        ([{"name": "a", "sae": SHARED, "sweep": {"lr": [1]}}], "`class_path` with `init_args`"),
        ([{"name": n, "sae": SHARED} for n in "ab"], "`a` and `b` share one ReLUSAE"),
        ([{"name": "a", "sae": RELU, "callbacks": [{"class_path": "No"}]}], "Member `a`: .*No"),
    ],
)
def test_what_does_not_fit_is_named(members: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SideBySide(members, d_in=4)


def test_what_a_member_refuses_when_fitting_starts_is_named() -> None:
    model = SideBySide(
        [
            {"name": "a", "sae": relu()},
            {"name": "b", "sae": TopKSAE(4, 12, k=2), "callbacks": [L1Warmup(3)]},
        ]
    )
    with pytest.raises(ValueError, match="Member `b`: `L1Warmup` needs an SAE with a sparsity"):
        fit(model, torch.randn(4, 8, 4))


def test_a_member_that_diverges_stops_and_the_others_go_on() -> None:
    batches = torch.randn(8, 8, 4)
    alone = relu()
    fit(alone, batches)
    wild = relu(lr=1e30)
    model = SideBySide(
        [{"name": "wild", "sae": wild, "callbacks": [L1Warmup(8)]}, {"name": "a", "sae": relu()}]
    )
    with pytest.warns(UserWarning, match="Member `wild` has stopped, the others go on. The loss"):
        trainer = fit(model, batches)
    assert trainer.global_step == 8
    assert torch.equal(model["a"].W_dec, alone.W_dec)
    assert list(model.stopped) == ["wild"]
    stopped = model.members[0]
    assert 0 < stopped.trainer.global_step < 8
    assert str(stopped.trainer.global_step) in model.stopped["wild"]
    assert wild.penalty_scale == 1.0  # its callbacks were told
    assert not stopped.optimizer.state


def test_a_run_ends_with_its_last_member() -> None:
    batches = torch.randn(4, 8, 4)
    batches[2] = math.nan
    members = [{"name": name, "sae": relu()} for name in "ab"]
    with (
        pytest.warns(UserWarning, match="has stopped"),
        pytest.raises(FloatingPointError, match="All members have stopped. `a`: The loss is nan"),
    ):
        fit(SideBySide(members), batches)


def test_each_member_logs_what_it_would_log_alone() -> None:
    batches, flags = torch.randn(9, 8, 4), {"log_every_n_steps": 2, "val_check_interval": 4}
    flags |= {"limit_val_batches": 2, "num_sanity_val_steps": 1}
    alone, together = Kept(), Kept()
    warmup = [DecoderNormProjection(), L1Warmup(6)]
    fit(relu(decoder_norm="unit"), batches, *warmup, logger=alone, **flags)
    warmup = [DecoderNormProjection(), L1Warmup(6)]
    members = [
        {"name": "a", "sae": relu(decoder_norm="unit"), "callbacks": warmup},
        {"name": "b", "sae": relu(lr=0.1)},
    ]
    fit(SideBySide(members), batches, logger=together, **flags)
    own = [
        (step, {k.removeprefix("a/"): v for k, v in values.items()})
        for step, values in together.rows
        if any(name.startswith("a/") for name in values)
    ]
    assert own == alone.rows
    assert {step for step, _ in own} == {1, 3, 5, 7}


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"precision": "16-mixed"}, "`16-mixed`"), ({"strategy": "fsdp"}, "`auto` or `ddp`")],
)
def test_what_would_not_be_exact_is_refused(
    flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_sae.side_by_side import checks

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer), "precision", flags.get("precision", "32-true"))
    if "strategy" in flags:
        monkeypatch.setattr(type(trainer), "strategy", object())
    with pytest.raises(ValueError, match=message):
        checks.require_supported(trainer)
