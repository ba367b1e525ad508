"""Lightning's own features, as `docs/lightning.md` lists them: each works, or is refused."""

import copy
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from lightning_sae import (
    ActivationDataModule,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SideBySide,
    SplitDictionary,
    TiedSAE,
    TopKSAE,
    ToyDataModule,
)
from lightning_sae.callbacks import (
    ExportSAE,
    LatentWriter,
    RunCheckpoint,
    StepMonitor,
    TargetL0,
)
from lightning_sae.distributed import waiting
from lightning_sae.distributed.parts import Parts
from lightning_sae.functional.penalties import Sqrt
from lightning_sae.training.supported import require_supported_features

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "relu": lambda: ReLUSAE(16, 32, penalty=Sqrt()),
    "tied": lambda: TiedSAE(16, 32, threshold_init=0.1),
    "gated": lambda: GatedSAE(16, 32),
    "jumprelu": lambda: JumpReLUSAE(16, 32, threshold_lr=0.01),
    "topk": lambda: TopKSAE(16, 32, k=4),
    "batch_topk": lambda: BatchTopKSAE(16, 32, k=4),
    "matryoshka": lambda: MatryoshkaSAE(16, 32, k=4, prefixes=2),
}
each_architecture = pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)


def toy(**arguments: Any) -> ToyDataModule:
    return ToyDataModule(
        8, 16, **{"batch_size": 32, "n_validation": 64, "n_test": 64, "scale": True, **arguments}
    )


def text(**arguments: Any) -> ActivationDataModule:
    sizes = {"context_length": 16, "blocks_per_pass": 8, "batch_size": 32, "buffer_size": 256}
    return ActivationDataModule(
        "blocks.0.hook_resid_post", **{**sizes, "n_validation": 128, "n_test": 128, **arguments}
    )


each_data = pytest.mark.parametrize("source", [toy, text])


def trainer_with(*callbacks: Callback, **flags: Any) -> Trainer:
    silent = ("logger", "enable_progress_bar", "enable_model_summary", "limit_val_batches")
    silence = {**dict.fromkeys(silent, False), "limit_val_batches": 0, "max_steps": 6}
    if not any(isinstance(callback, RunCheckpoint | ModelCheckpoint) for callback in callbacks):
        silence["enable_checkpointing"] = False
    return Trainer(callbacks=list(callbacks), accelerator="cpu", **{**silence, **flags})


def train(sae: Any, source: Any = None, *callbacks: Callback, **flags: Any) -> Trainer:
    trainer = trainer_with(*callbacks, **flags)
    trainer.fit(sae, datamodule=source or toy())
    return trainer


def sae_for(source: Any, **arguments: Any) -> ReLUSAE:
    return ReLUSAE(source.d_in, 32, **{"lr": 1e-3, **arguments})


def assert_same_weights(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


class Seen(Callback):
    """The sum and the size of each training batch."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.sizes: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self.sums.append(batch.double().sum().item())
        self.sizes.append(len(batch))


# After a fit, and checkpoints.

VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.parametrize("name", ["test", "validate", "predict"])
def test_evaluation_after_a_fit_needs_no_model(name: str) -> None:
    sae, data = ReLUSAE(16, 32), toy()
    trainer = train(sae, data, RunCheckpoint(), **VALIDATED)
    before = copy.deepcopy(sae)
    assert getattr(trainer, name)(datamodule=data)
    assert_same_weights(sae, before)  # the last checkpoint is of these weights


@pytest.mark.filterwarnings("ignore:.*configured with multiple `ModelCheckpoint`")
@pytest.mark.parametrize("first", [True, False])
def test_best_is_that_of_a_model_checkpoint_at_any_position_in_the_list(first: bool) -> None:
    saver = ModelCheckpoint(monitor="val/fvu", mode="max")
    order = [saver, RunCheckpoint()] if first else [RunCheckpoint(), saver]
    data, sae = toy(), ReLUSAE(16, 32, lr=0.1)
    trainer = train(sae, data, *order, **VALIDATED)
    (found,) = trainer.validate(sae, datamodule=data, ckpt_path="best", verbose=False)
    assert saver.best_model_score is not None
    assert found["val/fvu"] == pytest.approx(saver.best_model_score.item())


def test_best_without_a_checkpoint_is_refused() -> None:
    trainer = train(ReLUSAE(16, 32), toy(), RunCheckpoint(), fast_dev_run=True)
    with pytest.raises(ValueError, match="best"):
        trainer.test(datamodule=toy(), ckpt_path="best")


def test_last_is_refused_with_the_path_to_give() -> None:
    train(ReLUSAE(16, 32), toy(), RunCheckpoint())
    trainer = trainer_with(RunCheckpoint(), max_steps=9)
    with (
        pytest.warns(UserWarning, match="no last checkpoint available"),
        pytest.raises(ValueError, match=r"--ckpt_path .*last\.ckpt"),
    ):
        trainer.fit(ReLUSAE(16, 32), toy(), ckpt_path="last")


def test_a_model_checkpoint_that_would_rank_by_an_earlier_validation_is_refused() -> None:
    saver = ModelCheckpoint(monitor="val/fvu", every_n_train_steps=2)
    with pytest.raises(ValueError, match="every_n_train_steps"):
        train(ReLUSAE(16, 32), toy(), saver, **VALIDATED)


@each_architecture
@pytest.mark.filterwarnings("ignore:.*torch.load.*")
def test_load_from_checkpoint_gives_an_sae_that_can_be_trained(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    sae, path = make(), tmp_path / "sae.ckpt"
    train(sae).save_checkpoint(path)
    again = type(sae).load_from_checkpoint(path)
    assert_same_weights(again, sae)
    assert again.is_trained
    train(again, max_steps=1)


def test_load_from_checkpoint_takes_a_penalty_of_ones_own(tmp_path: Path) -> None:
    train(ReLUSAE(16, 32, penalty=Sqrt())).save_checkpoint(tmp_path / "sae.ckpt")
    own = Sqrt(epsilon=0.5)
    assert ReLUSAE.load_from_checkpoint(tmp_path / "sae.ckpt", penalty=own).penalty == own


def test_a_run_by_epochs_goes_on_with_more_of_them(tmp_path: Path) -> None:
    epochs = {"limit_train_batches": 3, "max_steps": -1}
    saes = [ReLUSAE(16, 32) for _ in range(2)]
    saes[1].load_state_dict(saes[0].state_dict())
    train(saes[0], max_epochs=4, **epochs)
    train(saes[1], toy(), RunCheckpoint(), max_epochs=2, **epochs, default_root_dir=tmp_path)
    trainer = trainer_with(RunCheckpoint(), max_epochs=4, **epochs, default_root_dir=tmp_path)
    resumed = ReLUSAE(16, 32)
    trainer.fit(resumed, toy(), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert trainer.global_step == 12
    assert_same_weights(resumed, saes[0])


# Tuners.


@each_data
def test_a_fit_after_lr_find_is_the_fit_alone(source: Callable[[], Any]) -> None:
    """Also `b_dec` is placed, and the scaling adopted."""
    saes = [sae_for(source()) for _ in range(2)]
    saes[1].load_state_dict(saes[0].state_dict())
    train(saes[0], source())
    trainer, data = trainer_with(), source()
    trainer = trainer_with(enable_checkpointing=True)
    Tuner(trainer).lr_find(saes[1], datamodule=data, num_training=5, update_attr=False)
    assert not saes[1].is_trained
    trainer.fit(saes[1], datamodule=data)
    assert_same_weights(saes[1], saes[0])


@pytest.mark.parametrize("make", [ReLUSAE, JumpReLUSAE])
def test_the_rate_that_a_learning_rate_finder_sets_stays_in_force(make: Any) -> None:
    sae = make(16, 32, lr=1e-7)
    trainer = train(
        sae, toy(), LearningRateFinder(num_training_steps=30), enable_checkpointing=True
    )
    assert sae.lr != 1e-7
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[0] == sae.lr  # thresholds have a rate of their own


@each_data
def test_a_batch_size_finder_tries_the_sizes_it_says(source: Callable[[], Any]) -> None:
    class Sized(ReLUSAE):
        sizes: list[int] = []  # noqa: RUF012

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.sizes.append(len(batch))
            return super().training_step(batch, batch_idx)

    data = source()
    sae = Sized(data.d_in, 32)
    finder = BatchSizeFinder(init_val=8, max_trials=3, steps_per_trial=1)
    train(sae, data, finder, max_steps=2, enable_checkpointing=True)
    assert sae.sizes[-4:] == [16, 32, 32, 32]
    assert data.batch_size == 32


# Epochs on a stream that has no end.


@each_data
def test_overfitting_trains_on_the_first_batches_again_and_again(
    source: Callable[[], Any], tmp_path: Path
) -> None:
    seen, plain = Seen(), Seen()
    sae = sae_for(data := source())
    trainer = train(sae, data, seen, RunCheckpoint(), overfit_batches=2, default_root_dir=tmp_path)
    train(sae_for(data), source(), plain, max_steps=2)
    assert seen.sums == plain.sums * 3
    again = Seen()
    trainer = trainer_with(again, RunCheckpoint(), overfit_batches=2, max_steps=8)
    path = tmp_path / "checkpoints/last.ckpt"
    trainer.fit(sae_for(data), source(), ckpt_path=path)
    assert again.sums == plain.sums


@pytest.mark.parametrize("name", ["overfit_batches", "limit_train_batches"])
def test_a_share_of_the_stream_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.{name}` to be a number"):
        train(ReLUSAE(16, 32), **{name: 0.5})


@each_data
def test_early_stopping_and_max_time_heed_min_steps(source: Callable[[], Any]) -> None:
    stop = EarlyStopping("val/fvu", patience=0, stopping_threshold=1e9)
    for callbacks, more in (([stop], VALIDATED), ([], {"max_time": "00:00:00:00"})):
        data = source()
        trainer = train(sae_for(data), data, *callbacks, max_steps=20, min_steps=4, **more)
        assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("callbacks", "flags", "named"),
    [
        ([EarlyStopping("train/loss", check_on_train_epoch_end=True)], {}, "EarlyStopping"),
        ([EarlyStopping("val/fvu")], {"limit_val_batches": 1.0}, "EarlyStopping"),
        ([Timer("00:00:00:00", interval="epoch")], {}, "Timer"),
        ([GradientAccumulationScheduler({0: 1, 2: 4})], {}, "GradientAccumulationScheduler"),
        ([], {"max_epochs": 3}, "max_epochs=3"),
        ([], {"min_epochs": 1}, "min_epochs=1"),
        ([], {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders"),
    ],
)
@each_data
def test_what_waits_for_the_end_of_an_epoch_is_refused(
    callbacks: list[Callback], flags: dict[str, Any], named: str, source: Callable[[], Any]
) -> None:
    data = source()
    with pytest.raises(ValueError, match=f"{named}.*limit_train_batches"):
        train(sae_for(data), data, *copy.deepcopy(callbacks), **flags)


@pytest.mark.filterwarnings("ignore:When using .Trainer.accumulate_grad_batches")
def test_where_batches_are_limited_epochs_end() -> None:
    stop = EarlyStopping("train/loss", check_on_train_epoch_end=True, patience=0, mode="max")
    accumulate = GradientAccumulationScheduler({0: 1, 1: 3})
    seen = Seen()
    flags = {"limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1}
    trainer = train(ReLUSAE(16, 32), toy(), accumulate, seen, max_epochs=2, max_steps=-1, **flags)
    assert trainer.global_step == 3 + 1
    assert len(set(seen.sums)) == 6  # the stream goes on
    trainer = train(ReLUSAE(16, 32, lr=0.1), toy(), stop, max_steps=30, **flags)
    assert trainer.global_step < 30


@each_data
def test_validation_may_go_by_the_clock(source: Callable[[], Any]) -> None:
    data = source()
    flags = {**VALIDATED, "val_check_interval": "00:00:00:00"}
    assert "val/fvu" in train(sae_for(data), data, max_steps=2, **flags).callback_metrics


# The trainer's flags.


@each_architecture
def test_deterministic_runs_train_the_same_weights(make: Callable[[], Any]) -> None:
    sae = make()
    other = copy.deepcopy(sae)
    train(sae)
    try:
        train(other, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_weights(other, sae)


@pytest.mark.parametrize(
    "flags",
    [
        {"profiler": "simple"},
        {"profiler": "advanced"},
        {"profiler": "pytorch"},
        {"detect_anomaly": True},
        {"inference_mode": False},
        {"sync_batchnorm": True},
        {"num_sanity_val_steps": 1, **VALIDATED},
        {"strategy": "ddp", "devices": 1},
        {"strategy": "ddp_find_unused_parameters_true", "devices": 1},
        {"barebones": True},
    ],
    ids=lambda flags: next(iter(flags.values())) if "strategy" in flags else next(iter(flags)),
)
def test_flags_that_change_no_weight(flags: dict[str, Any], tmp_path: Path) -> None:
    saes = [TopKSAE(16, 32, k=4)]
    saes.append(copy.deepcopy(saes[0]))
    train(saes[0])
    if flags.get("barebones"):
        Trainer(accelerator="cpu", max_steps=6, limit_val_batches=0, **flags).fit(saes[1], toy())
    else:
        train(saes[1], default_root_dir=tmp_path, **flags)
    assert_same_weights(saes[1], saes[0])


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_launcher_that_gives_weights_back_leaves_a_trained_sae() -> None:
    """`ddp_fork`, as `ddp_spawn` and `ddp_notebook`, trains in other processes."""
    sae, there = ReLUSAE(16, 32), ReLUSAE(16, 32)
    there.load_state_dict(sae.state_dict())
    train(there)
    train(sae, strategy="ddp_fork", devices=1)
    assert_same_weights(sae, there)
    assert sae.is_trained


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_cut_weights_up_are_refused(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning lets none of them run on a CPU, so none is set up."""
    trainer = trainer_with()
    monkeypatch.setattr(Trainer, "strategy", object.__new__(kind))
    with pytest.raises(ValueError, match=f"trainer.strategy.*{kind.__name__}"):
        require_supported_features(ReLUSAE(16, 32), trainer, "fit")


class Pulled(ReLUSAE):
    """Has a loss of its own, of which nobody knows whether it needs all latents."""

    def objective(self, x):
        return super().objective(x)


@pytest.mark.parametrize(
    ("make", "flags", "stage", "message"),
    [
        (lambda: ReLUSAE(16, 31), {}, "fit", "`d_sae` to be a multiple of the 2 parts.*choose 32"),
        (lambda: Pulled(16, 32), {}, "fit", "`Pulled` has an `activate`.*`may_be_split = True`"),
        (
            lambda: SideBySide([{"name": "a", "sae": ReLUSAE(16, 32)}]),
            {},
            "fit",
            "one SAE with.*`SideBySide`",
        ),
        (
            lambda: ReLUSAE(16, 32, orthogonality_coefficient=1.0),
            {},
            "fit",
            "orthogonality, nor other tables .peaks.recent.",
        ),
        (lambda: ReLUSAE(16, 32), {"precision": "16-mixed"}, "fit", "`16-mixed`.*`bf16-mixed`"),
        (lambda: ReLUSAE(16, 32), {}, "predict", "does not support `predict`"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*precision=.16.* is not supported")
def test_what_a_split_dictionary_lacks_is_refused(
    make: Callable[[], Any], flags: Any, stage: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, strategy = trainer_with(), SplitDictionary()
    strategy.parts = Parts()
    strategy.parts.n = 2  # devices that are not there
    monkeypatch.setattr(Trainer, "strategy", strategy)
    if flags:
        monkeypatch.setattr(Trainer, "precision", flags["precision"])
    with pytest.raises(ValueError, match=message):
        require_supported_features(make(), trainer, stage)


def test_a_process_that_waits_for_the_others_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and only if it waits long; one that has met them says nothing."""
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    monkeypatch.setattr(SplitDictionary, "_meet", lambda _: None)
    for seconds, messages in ((0.0, 0), (0.9, 1)):
        monkeypatch.setattr(DDPStrategy, "setup_environment", lambda _, s=seconds: time.sleep(s))
        with caplog.at_level("WARNING", logger="lightning.pytorch"):
            SplitDictionary(timeout=timedelta(minutes=5)).setup_environment()
            time.sleep(0.4)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == messages
    assert "waited 0.2 s for the others" in said[0]
    assert "0:05:00" in said[0]


def test_a_split_dictionary_is_chosen_by_name() -> None:
    strategy = Trainer(strategy="SplitDictionary", accelerator="cpu", logger=False).strategy
    assert isinstance(strategy, SplitDictionary)
    assert strategy.n_parts is None


def test_a_subclass_that_exchanges_what_it_needs_may_be_split() -> None:
    class Exchanges(Pulled):
        may_be_split = True

    class Renamed(Exchanges):
        pass

    assert Renamed.may_be_split
    assert not Pulled.may_be_split


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@each_architecture
def test_half_precision_weights_are_not_trained(make: Callable[[], Any], precision: Any) -> None:
    with pytest.raises(ValueError, match="trainer.precision.*bf16-mixed"):
        train(make(), precision=precision)


def test_an_sae_that_was_converted_to_half_precision_is_not_trained_either() -> None:
    with pytest.raises(ValueError, match=r"weights of torch\.bfloat16"):
        train(ReLUSAE(16, 32).bfloat16())


@pytest.mark.parametrize("make", [ARCHITECTURES[n] for n in ("tied", "jumprelu", "batch_topk")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_stay_in_float32(make: Callable[[], Any], dtype: torch.dtype) -> None:
    sae = make()
    with torch.no_grad():
        sae.threshold.fill_(0.1234567)
    assert sae.to(dtype).threshold.dtype == torch.float32
    assert sae.threshold.max().item() == torch.tensor(0.1234567).item()
    assert sae.W_dec.dtype == sae.encode(torch.randn(4, 16, dtype=dtype)).dtype == dtype
    assert sae.double().threshold.dtype == torch.float64
    assert sae.to(torch.float32).threshold.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*16-mixed")
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "16-mixed"])
@each_architecture
def test_other_precisions_train_finite_weights_of_their_own_dtype(
    make: Callable[[], Any], precision: Any
) -> None:
    sae = make()
    train(sae, precision=precision, max_steps=3)
    assert all(w.isfinite().all() for w in sae.parameters())
    assert sae.W_dec.dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_double_precision_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Lightning restores weights before it converts the module."""
    saes = [ReLUSAE(16, 32, lr=0.01)]
    saes += [copy.deepcopy(saes[0]), copy.deepcopy(saes[0])]
    train(saes[0], precision="64-true")
    train(saes[1], precision="64-true", max_steps=3).save_checkpoint(tmp_path / "a.ckpt")
    resumed = trainer_with(precision="64-true")
    resumed.fit(saes[2], datamodule=toy(), ckpt_path=tmp_path / "a.ckpt")
    assert saes[2].W_dec.dtype == torch.float64
    assert_same_weights(saes[2], saes[0])


def test_half_precision_evaluates() -> None:
    sae, data = BatchTopKSAE(16, 32, k=4), toy(n_validation=512)
    train(sae, max_steps=50)
    l0 = []
    for precision in ("32-true", "bf16-true"):
        (found,) = trainer_with(precision=precision, limit_val_batches=1.0).validate(
            sae, datamodule=data, verbose=False
        )
        l0.append(found["val/l0"])
    assert l0[1] == pytest.approx(l0[0], rel=0.05)


def gradients_after_clipping(**flags: Any) -> Tensor:
    class Noted(Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if module.W_enc.grad is not None:
                self.largest = module.W_enc.grad.abs().max()

    noted = Noted()
    train(ReLUSAE(16, 32, clip_grad_norm=1e-3), toy(), noted, max_steps=2, **flags)
    return noted.largest


def test_clipping_by_value_takes_the_place_of_the_own_one() -> None:
    flags = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
    assert gradients_after_clipping(**flags).item() == pytest.approx(1e-4)


def test_a_way_of_clipping_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer.gradient_clip_val"):
        train(ReLUSAE(16, 32), gradient_clip_algorithm="value")


def test_several_loggers_get_the_same(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b"), TensorBoardLogger(tmp_path, "c")]
    sae = ReLUSAE(16, 32, penalty=Sqrt())
    callbacks = [LearningRateMonitor(), DeviceStatsMonitor()]
    train(sae, toy(), *callbacks, logger=loggers, log_every_n_steps=1)
    rows = [Path(logger.log_dir, "metrics.csv").read_text() for logger in loggers[:2]]  # type: ignore[arg-type]
    assert "train/l0" in rows[0]
    assert "lr-MemoryOrderAdam" in rows[0]
    assert len(rows[0].splitlines()) == len(rows[1].splitlines()) >= 7


@pytest.mark.filterwarnings(
    "ignore:.*was called without a model", "ignore:.*no last checkpoint", "ignore:.*flops_per"
)
def test_what_watches_a_run_changes_no_weight(tmp_path: Path) -> None:
    sae = ReLUSAE(16, 32)
    other = copy.deepcopy(sae)
    train(sae)
    watchers = [ThroughputMonitor(batch_size_fn=len), OnExceptionCheckpoint(tmp_path)]
    logger = CSVLogger(tmp_path)
    train(other, toy(), *watchers, logger=logger, log_every_n_steps=1, enable_checkpointing=True)
    assert_same_weights(other, sae)


@pytest.mark.parametrize("name", ["test", "validate", "predict"])
def test_evaluation_reads_as_many_batches_as_asked_for(name: str) -> None:
    class Counted(Callback):
        n = 0

        def on_test_batch_end(self, *_: Any) -> None:
            self.n += 1

        on_validation_batch_end = on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]

    counted = Counted()
    limit = {"validate": "limit_val_batches"}.get(name, f"limit_{name}_batches")
    trainer = trainer_with(counted, **{limit: 2})
    getattr(trainer, name)(ReLUSAE(16, 32), datamodule=toy(n_validation=320, n_test=320))
    assert counted.n == 2


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_launcher_that_gives_weights_back_also_gives_the_path_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    sae, data = ReLUSAE(16, 32), toy()
    flags = {"strategy": "ddp_fork", "devices": 1, "default_root_dir": tmp_path}
    trainer = train(sae, data, RunCheckpoint(), **flags)
    saver: Any = trainer.checkpoint_callback
    assert saver.best_model_path == str(tmp_path / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("name", ["validate", "test"])
def test_several_held_out_loaders_are_refused(name: str) -> None:
    loaders: Any = [DataLoader(torch.randn(8, 16), batch_size=4) for _ in range(2)]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected one loader of held-out activations"):
        getattr(trainer_with(limit_val_batches=1.0), name)(ReLUSAE(16, 32), loaders, verbose=False)


# Optimizers and parameters.


class Stepping(ReLUSAE):
    """With another optimizer."""

    kind: Any = torch.optim.SGD

    def configure_optimizers(self) -> Any:
        return None if self.kind is None else self.kind(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, None])
def test_an_optimizer_of_ones_own_keeps_rows_at_norm_1(optimizer: Any) -> None:
    sae = Stepping(16, 32)
    sae.kind = optimizer
    train(sae, limit_train_batches=3, max_epochs=1, max_steps=-1)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))


def test_an_optimizer_that_cannot_train_an_sae_is_refused() -> None:
    sae = Stepping(16, 32)
    sae.kind = torch.optim.LBFGS
    with pytest.raises(ValueError, match="`LBFGS` is not supported"):
        train(sae)


class FreezesAll(BaseFinetuning):
    """Lightning's freezing, of everything."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module)

    def finetune_function(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("by_callback", [True, False])
def test_an_sae_without_anything_to_train_is_refused(by_callback: bool) -> None:
    sae = ReLUSAE(16, 32)
    if not by_callback:
        sae.freeze()
    with pytest.raises(ValueError, match="`requires_grad` of all of them is False"):
        train(sae, toy(), *([FreezesAll()] if by_callback else []))


def test_a_frozen_decoder_stays() -> None:
    sae = ReLUSAE(16, 32)
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.clone()
    train(sae)
    assert torch.equal(sae.W_dec, before)


def test_parameters_that_are_computed_or_have_no_values_are_refused() -> None:
    pruned, parametrized = ReLUSAE(16, 32), ReLUSAE(16, 32)
    prune.l1_unstructured(pruned, "W_dec", amount=0.5)
    weight_norm(parametrized, "W_dec")
    with torch.device("meta"):
        absent = ReLUSAE(16, 32)
    for sae, message in (
        (pruned, "W_dec_orig"),
        (parametrized, "W_dec.orig"),
        (absent, "device `meta`"),
    ):
        with pytest.raises(ValueError, match=message):
            train(sae)


# Callbacks that would spoil an SAE.


@pytest.mark.parametrize(
    "callback",
    [
        StochasticWeightAveraging(1e-2, swa_epoch_start=1),
        WeightAveraging(),
        EMAWeightAveraging(),
        ModelPruning("l1_unstructured", amount=0.5),
        BackboneFinetuning(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_averages_and_pruning_are_refused(callback: Callback) -> None:
    with pytest.raises(ValueError, match=f"{type(callback).__name__}` is not supported"):
        train(ReLUSAE(16, 32), toy(), callback)
    members = [{"name": "a", "sae": ReLUSAE(16, 32)}]
    with pytest.raises(ValueError, match=f"{type(callback).__name__}` is not supported"):
        train(SideBySide(members), toy(), callback)


def test_one_learning_rate_for_saes_side_by_side_is_not_looked_for() -> None:
    members = [{"name": "a", "sae": ReLUSAE(16, 32)}]
    with pytest.raises(ValueError, match="LearningRateFinder.*`sweep`"):
        train(SideBySide(members), toy(), LearningRateFinder())


OF_ONE = [LearningRateMonitor(), TargetL0(4.0), ExportSAE(), LatentWriter(), StepMonitor()]


@pytest.mark.parametrize("callback", OF_ONE, ids=lambda each: type(each).__name__)
def test_callbacks_of_a_single_sae_are_refused_for_a_run_of_several(
    callback: Callback, tmp_path: Path
) -> None:
    together = SideBySide([{"name": "a", "sae": ReLUSAE(16, 32)}])
    with pytest.raises(ValueError, match=f"`{type(callback).__name__}`.* each member"):
        train(together, toy(), callback, logger=CSVLogger(tmp_path))


def test_saes_side_by_side_need_a_trainer() -> None:
    with pytest.raises(ValueError, match="side by side need a Lightning trainer"):
        SideBySide([{"name": "a", "sae": ReLUSAE(16, 32)}]).configure_optimizers()


# The module in other hands.


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_sae_is_refused_and_left_as_it_was() -> None:
    sae = ReLUSAE(16, 32)
    with pytest.raises(ValueError, match=r"torch.compile.*sae\.compile\(\)"):
        train(torch.compile(sae, backend="eager"))
    train(sae)
    train(sae, max_steps=1)
    x = torch.randn(4, 16)
    torch.testing.assert_close(torch.compile(sae, backend="eager")(x), sae(x))


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_forward_trains() -> None:
    sae = ReLUSAE(16, 32)
    sae.compile(backend="eager")
    assert train(sae).global_step == 6


class Manual(ReLUSAE):
    """Steps by itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        found = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(found["loss"])
        optimizer.step()
        return found


def test_manual_optimization_trains_the_weights_of_automatic_one() -> None:
    plain: dict[str, Any] = {"clip_grad_norm": None, "lr_decay_steps": 0}
    saes: list[Any] = [kind(16, 32, **plain) for kind in (ReLUSAE, Manual)]
    saes[1].load_state_dict(saes[0].state_dict())
    steps = [train(sae, toy(), RunCheckpoint(2)).global_step for sae in saes[:1]]
    steps.append(train(saes[1]).global_step)
    assert steps == [6, 6]
    assert_same_weights(saes[1], saes[0])


def test_manual_optimization_without_a_step_of_its_own_is_refused() -> None:
    class Idle(ReLUSAE):
        automatic_optimization = False

    with pytest.raises(ValueError, match="`Idle` sets `automatic_optimization"):
        train(Idle(16, 32))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("with_fabric", [True, False])
@each_architecture
def test_a_loop_of_ones_own_trains_the_weights_of_a_trainer(
    make: Callable[[], Any], with_fabric: bool
) -> None:
    """The optimizer keeps decoder rows at norm 1, and the first step places `b_dec`."""
    expected, sae = make(), make()
    sae.load_state_dict(expected.state_dict())
    expected.clip_grad_norm = None
    batches = torch.randn(5, 32, 16) + 1
    trainer = trainer_with(max_steps=5)
    trainer.fit(expected, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    module, optimizer = sae, sae.configure_optimizers()["optimizer"]
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    if with_fabric:
        module, optimizer = fabric.setup(sae, optimizer)
    for i, batch in enumerate(batches):
        loss = module.training_step(batch, i)["loss"]
        optimizer.zero_grad()
        fabric.backward(loss) if with_fabric else loss.backward()
        optimizer.step()
    if with_fabric:
        assert sae.trainer is not None
    torch.testing.assert_close(sae.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_fabric_on_several_ranks_is_refused() -> None:
    sae = ReLUSAE(16, 32)
    fabric = SimpleNamespace(world_size=2)
    sae._fabric = fabric  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Fabric to have one device but got 2"):
        sae.training_step(torch.randn(4, 16), 0)


@each_architecture
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))])
def test_an_sae_can_be_copied_and_pickled_whenever(
    make: Callable[[], Any], copied: Callable[[Any], Any]
) -> None:
    class Midway(Callback):
        def on_train_batch_end(self, trainer: Any, module: LightningModule, *_: Any) -> None:
            assert_same_weights(copied(module), module)

    sae = copied(make())
    train(sae, toy(), Midway(), max_steps=2)
    again = copied(sae)
    assert again.is_trained
    x = torch.randn(4, 16)
    torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
    train(again, max_steps=1)


@each_data
def test_data_can_be_copied_and_pickled_and_go_on_where_they_stand(
    source: Callable[[], Any],
) -> None:
    class Midway(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, b: Any, i: int
        ) -> None:
            if i == 2:
                self.copies = [copy.deepcopy(trainer.datamodule)]
                self.copies += [pickle.loads(pickle.dumps(trainer.datamodule))]

    midway, seen = Midway(), Seen()
    data = pickle.loads(pickle.dumps(source()))
    train(sae_for(data), data, midway, seen)
    pickle.dumps(data)  # and afterwards
    for other in midway.copies:
        following = Seen()
        train(sae_for(other), other, following, max_steps=3)
        assert following.sums == seen.sums[3:]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_loop_in_the_docs_trains(repository: Path) -> None:
    text = (repository / "docs" / "lightning.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    sae, batches = ReLUSAE(16, 32, lr=0.01), list(torch.randn(60, 32, 16))
    before = sae.objective(batches[0]).losses["squared_error"].item()
    exec(code, {"sae": sae, "batches": batches})
    assert sae.objective(batches[0]).losses["squared_error"].item() < 0.8 * before
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))


def test_rows_of_an_optimizer_outside_of_a_trainer_keep_their_norm() -> None:
    sae = ReLUSAE(16, 32, lr=0.1)
    optimizer = sae.configure_optimizers()["optimizer"]
    sae.objective(torch.randn(8, 16)).losses["squared_error"].backward()
    optimizer.step()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
