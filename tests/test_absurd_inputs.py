"""Data and weights that no SAE comes of are named, not trained on or exported in silence."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sae import BatchTopKSAE, ReLUSAE, SideBySide, TopKSAE
from lightning_sae.callbacks import (
    DeadFeatureResampling,
    RunCheckpoint,
    SAEProgressBar,
    StreamMonitor,
    TargetL0,
)
from lightning_sae.callbacks.results import ExportSAE
from lightning_sae.data.buffer import ShuffleBuffer
from lightning_sae.data.scaling import require_precision, require_usable

PLAIN: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fitted(sae: Any, rows: Any, *callbacks: Any, **options: Any) -> Trainer:
    """A trainer that has fitted on rows."""
    loader = rows if isinstance(rows, DataLoader) else DataLoader(rows, batch_size=16)
    trainer = Trainer(**PLAIN | {"max_steps": 3, "callbacks": list(callbacks)} | options)
    trainer.fit(sae, loader)
    return trainer


@pytest.fixture
def rows() -> Tensor:
    """Activations."""
    return torch.randn(64, 4)


# Not finite.


def test_weights_are_looked_at_after_the_last_step(rows: Tensor) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite after optimizer step 1 \(W_dec, W_"):
        fitted(ReLUSAE(4, 8, lr=1e38), rows, max_steps=1)


def test_what_is_not_finite_is_neither_exported_nor_kept(rows: Tensor, tmp_path: Path) -> None:
    sae, root = ReLUSAE(4, 8), tmp_path / "run"

    class Spoil(RunCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *rest: Any) -> None:
            if trainer.global_step == 2:
                module.W_dec.data[3, 1] = math.nan
            super().on_train_batch_end(trainer, module, *rest)

    with pytest.raises(FloatingPointError, match=r"after optimizer step 2 \(W_dec\), and are not"):
        fitted(sae, rows, Spoil(1), ExportSAE(), default_root_dir=root, enable_checkpointing=True)
    kept = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 1
    assert sorted(path.name for path in root.rglob("*")) == ["checkpoints", "last.ckpt"]
    with pytest.raises(ValueError, match=r"not written to .*, for its weights are not finite"):
        sae.save_pretrained(root / "sae")


def test_a_member_whose_last_step_failed_does_not_take_the_others_along(rows: Tensor) -> None:
    both = SideBySide(
        [{"name": "good", "sae": ReLUSAE(4, 8)}, {"name": "bad", "sae": ReLUSAE(4, 8, lr=1e38)}]
    )
    with pytest.warns(UserWarning, match="Member `bad` has stopped"):
        fitted(both, rows, max_steps=1)
    assert list(both.stopped) == ["bad"]
    assert "after optimizer step 1" in both.stopped["bad"]


@pytest.mark.parametrize(
    ("arguments", "factor", "message", "never"),
    [
        ({}, 1e19, r"of norm 2.*e\+19, .*`data.scale`", "`lr`"),
        ({"l1_coefficient": 1e39}, 1.0, "in l1 at .* lower the coefficient of l1", "max_norm"),
        ({"lr": 1e38}, 1.0, "lower `lr`", "max_norm"),
    ],
)
def test_a_loss_that_is_not_finite_says_what_is_at_fault(
    rows: Tensor, arguments: dict[str, Any], factor: float, message: str, never: str
) -> None:
    with pytest.raises(FloatingPointError, match=message) as error:
        fitted(ReLUSAE(4, 8, **arguments), factor * rows)
    assert never not in str(error.value)


def test_held_out_activations_that_are_not_finite_are_counted(rows: Tensor) -> None:
    rows[[3, 20], 1] = math.nan
    loader: Any = DataLoader(rows, batch_size=16)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="^2 held-out activations are not finite"):
        Trainer(**PLAIN).validate(ReLUSAE(4, 8), loader, verbose=False)


# Batches of a user's own.


@pytest.mark.usefixtures("unchecked")
def test_a_batch_that_is_no_matrix_of_floats_is_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \[batch, d_in\] but got \(16, 2, 4\)"):
        fitted(ReLUSAE(4, 8), rows.reshape(32, 2, 4))
    with pytest.raises(ValueError, match=r"floating-point dtype but got torch.int64"):
        fitted(ReLUSAE(4, 8), rows.long())
    loader: Any = DataLoader(rows.reshape(32, 2, 4), batch_size=16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \[batch, d_in\] but got \(16, 2, 4\)"):
        Trainer(**PLAIN).validate(ReLUSAE(4, 8), loader, verbose=False)


STRANGE: dict[str, Any] = {
    "no axis": torch.tensor(1.0),
    "integers": torch.ones(16, 4, dtype=torch.int64),
    "truth values": torch.ones(16, 4, dtype=torch.bool),
    "complex": torch.ones(16, 4, dtype=torch.complex64),
    "8 bits": torch.ones(16, 4).to(torch.float8_e4m3fn),
    "sparse": torch.eye(4).to_sparse(),
    "a list": [torch.ones(16, 4)],
    "width": torch.ones(16, 5),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_what_is_no_tensor_of_activations_is_refused_wherever_it_comes(strange: Any) -> None:
    sae = ReLUSAE(4, 8)
    loader: Any = DataLoader([strange] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(**PLAIN | {"max_steps": 2})
    for use in (
        lambda: fitted(sae, loader),
        lambda: fitted(SideBySide([{"name": "a", "sae": sae}]), loader),
        lambda: trainer.validate(sae, loader, verbose=False),
        lambda: trainer.predict(sae, loader),
        lambda: sae.encode(strange),
        lambda: sae.decode(strange),
    ):
        with pytest.raises(ValueError, match=r"^Expected "):
            use()


@pytest.mark.usefixtures("unchecked")
def test_predictions_are_of_rows(rows: Tensor) -> None:
    loader: Any = DataLoader(rows.reshape(32, 2, 4), batch_size=16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \[batch, d_in\] but got \(16, 2, 4\)"):
        Trainer(**PLAIN).predict(ReLUSAE(4, 8), loader)


@pytest.mark.filterwarnings(
    "ignore:train_dataloader yielded None", "ignore:Detected call of .lr_scheduler.step"
)
@pytest.mark.parametrize("sae", [ReLUSAE(4, 8), BatchTopKSAE(4, 8, k=2)])
def test_batches_of_nothing_are_no_batches(sae: Any) -> None:
    """Lightning skips them, and would start epochs for ever."""
    nothing: Any = [None] * 3
    with pytest.raises(ValueError, match="training data gave no batch"):
        fitted(sae, DataLoader(nothing, batch_size=None))


@pytest.mark.filterwarnings(
    "ignore:train_dataloader yielded None",
    "ignore:Detected call of .lr_scheduler.step",
    "ignore:.TargetL0. did not reach its target",
)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_batches_of_nothing_between_others_change_nothing(side_by_side: bool) -> None:
    """Not even when latents are resampled and the coefficient is steered."""
    rows, weights = [*torch.randn(12, 16, 4)], []
    among = [part for batch in rows for part in (batch, None, None)]
    for batches in (rows, [None, *among]):
        torch.manual_seed(0)
        sae = ReLUSAE(4, 24, 0.3, lr=0.01)
        resampling = DeadFeatureResampling(4, "reinitialize", window=3, min_frequency=0.3)
        callbacks = [resampling, TargetL0(2.0), SAEProgressBar(), StreamMonitor()]
        given = [] if side_by_side else callbacks
        own = [{"name": "a", "sae": sae, "callbacks": callbacks[:2]}]
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        module = SideBySide(own) if side_by_side else sae
        flags = {"enable_progress_bar": not side_by_side}
        trainer = fitted(module, loader, *given, max_steps=-1, max_epochs=1, **flags)
        assert trainer.global_step == 12
        assert resampling.state_dict()["n_done"] == 3
        weights.append(sae.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_a_member_without_its_hook_in_the_batch_is_named(rows: Tensor) -> None:
    loader: Any = DataLoader([{"x": rows}], batch_size=None)  # type: ignore[arg-type]
    member = {"name": "a", "hook_name": "y", "sae": ReLUSAE(4, 8)}
    with pytest.raises(ValueError, match="hook of member `a`, y, but got x"):
        fitted(SideBySide([member]), loader)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_converted(dtype: torch.dtype, rows: Tensor) -> None:
    found = []
    for given in (rows.to(dtype), rows.to(dtype).float()):
        torch.manual_seed(0)
        sae = TopKSAE(4, 64, k=2)
        fitted(sae, given)
        found.append(sae)
    assert torch.allclose(found[0].W_dec, found[1].W_dec)
    assert found[0].encode(rows.to(dtype)).dtype == torch.float32


class NoRows(IterableDataset):
    """An empty stream, whose length nobody knows."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([])


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("data", [torch.zeros(0, 4), NoRows()])
def test_data_without_a_batch_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="training data gave no batch"):
        fitted(ReLUSAE(4, 8), DataLoader(data, batch_size=16))


def test_no_batch_that_was_asked_for_is_no_error(rows: Tensor) -> None:
    fitted(ReLUSAE(4, 8), rows, limit_train_batches=0)


# Activations that spoil an SAE.


def test_activations_whose_gradients_overflow_are_refused(rows: Tensor) -> None:
    """The loss is finite, but a gradient's square is not, and Adam would move nothing."""
    with pytest.raises(FloatingPointError, match="squares of their gradients.*`data.scale`"):
        fitted(ReLUSAE(4, 8), rows * 1e12)
    fitted(ReLUSAE(4, 8), rows * 1e12, precision="64-true")


def test_activations_shorter_than_a_step_are_named(rows: Tensor) -> None:
    with pytest.warns(UserWarning, match="first steps of Adam move `b_dec`.*`data.scale`"):
        fitted(ReLUSAE(4, 8), rows * 1e-5)


def test_zeros_are_named(rows: Tensor) -> None:
    with pytest.warns(UserWarning, match="All 16 activations of the first batch are zero"):
        fitted(BatchTopKSAE(4, 64), torch.zeros(64, 4))
    with pytest.raises(ValueError, match=r"first 64 activations at blocks.0 are zero: choose ano"):
        require_usable(0 * rows, "blocks.0")


def test_few_rows_that_decide_the_scale_are_named_with_figures() -> None:
    rows = torch.nn.functional.normalize(torch.randn(2000, 4), dim=-1)
    require_usable(rows, "blocks.0")  # none is
    rows[:2] *= 300
    # Squares: 2 * 300² of 2 * 300² + 1998 are 99 %; the mean norm is (1998 + 600) / 2000.
    said = r"2 of the first 2000 .*, up to 300 times\. They have 99% .* 1.30 times .*max_norm_mul"
    with pytest.warns(UserWarning, match=said):
        require_usable(rows.bfloat16(), "blocks.0")


def test_rows_that_few_digits_cannot_tell_apart_are_named(rows: Tensor) -> None:
    require_precision(rows, torch.bfloat16)
    rows[:, 2] += 1e5
    with pytest.warns(UserWarning, match=r"coordinate 2 is 1e\+05 .*Set `dtype` to `float32`"):
        require_precision(rows, torch.bfloat16)
    with pytest.raises(ValueError, match=r"`dtype` to hold activations up to 1e\+05 but"):
        require_precision(rows, torch.float16)


class Rows:
    """A source of the same rows."""

    def read(self) -> Tensor:
        return torch.ones(8, 4)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def test_the_first_full_buffer_is_looked_at_once() -> None:
    seen: list[int] = []
    buffer = ShuffleBuffer(Rows(), 16, 4, prefetch=False, look_at=lambda x: seen.append(len(x)))
    for _ in range(12):
        next(buffer)
    assert seen == [16]
