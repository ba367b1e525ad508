import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import ReLUSAE, TiedSAE, load
from lightning_sae.architectures.objective import Step
from lightning_sae.architectures.portable import folded_state
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup, RunCheckpoint
from lightning_sae.data import ActivationSource
from lightning_sae.data.scaling import Scaling
from lightning_sae.functional.sparse.code import Layout
from lightning_sae.studies.shared.toy_training import quiet
from lightning_sae.training.optimizer import warmup_stable_decay


class Activations(ActivationSource):
    """A given tensor in order, with what an SAE asks of its data."""

    def __init__(self, x: Tensor, batch_size: int = 16, scaling: Scaling | None = None) -> None:
        super().__init__()
        self.x, self.batch_size, self.given_scaling = x, batch_size, scaling
        self.d_in = x.shape[1]
        self.origin = {"hook_name": "somewhere"}

    @property
    def source(self) -> dict[str, Any]:
        return self.origin

    def scaling(self) -> Scaling | None:
        return self.given_scaling

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.x, batch_size=self.batch_size)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def quiet_trainer(**arguments: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
    )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def free_sae(d_in: int = 4, d_sae: int = 6, **arguments: Any) -> ReLUSAE:
    """An SAE that needs no callback."""
    return ReLUSAE(d_in, d_sae, **{"decoder_norm": "free", **arguments})


def scaled_sae(**arguments: Any) -> ReLUSAE:
    """An SAE with all weights random that sees centred and scaled activations."""
    sae = free_sae(4, 6, **arguments)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    sae.input_mean.copy_(torch.randn(4))
    sae.input_scale.fill_(2.5)
    return sae


def test_latents_and_reconstruction_are_in_raw_units() -> None:
    sae, x = scaled_sae(), torch.randn(5, 4)
    inner = (x - sae.input_mean) * 2.5
    f = torch.relu((inner - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), f / 2.5)
    torch.testing.assert_close(sae(x), (f @ sae.W_dec + sae.b_dec) / 2.5 + sae.input_mean)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_folded_weights_act_on_raw_activations(apply_b_dec_to_input: bool) -> None:
    sae, x = scaled_sae(apply_b_dec_to_input=apply_b_dec_to_input), torch.randn(5, 4)
    folded = free_sae(4, 6, apply_b_dec_to_input=apply_b_dec_to_input)
    folded.load_state_dict(folded_state(sae), strict=False)
    torch.testing.assert_close(folded.encode(x), sae.encode(x))
    torch.testing.assert_close(folded(x), sae(x))


def test_first_batch_places_b_dec_at_its_mean_after_the_data_scaling() -> None:
    x = torch.randn(16, 4) + 3
    scaling = Scaling(torch.full((4,), 2.0), torch.tensor(0.5))
    sae = free_sae(4, 6, lr=1e-12)
    quiet_trainer(max_steps=1).fit(sae, datamodule=Activations(x, scaling=scaling))
    torch.testing.assert_close(sae.b_dec.data, (x.mean(0) - 2) * 0.5)
    assert sae.input_scale.item() == 0.5


def test_b_dec_can_start_at_the_origin_and_training_goes_on_from_a_trained_one() -> None:
    x = torch.randn(16, 4) + 3
    sae = free_sae(4, 6, lr=1e-12, b_dec_init="zero")
    quiet_trainer(max_steps=1).fit(sae, datamodule=Activations(x))
    assert sae.b_dec.abs().max() < 1e-6
    sae.b_dec_init = "mean"  # trained already: the second fit leaves b_dec where it is
    quiet_trainer(max_steps=1).fit(sae, datamodule=Activations(x))
    assert sae.b_dec.abs().max() < 1e-6


def test_learning_rate_rises_stays_and_falls() -> None:
    shares = [warmup_stable_decay(step, warmup=4, decay=5, total=20) for step in range(20)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert shares[4:16] == [1.0] * 12
    assert shares[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


class LearningRates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedule_counts_optimizer_steps_not_batches() -> None:
    rates = LearningRates()
    sae = free_sae(4, 6, lr=0.1, lr_warmup_steps=2, lr_decay_steps=2)
    trainer = quiet_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[rates])
    trainer.fit(sae, DataLoader(torch.randn(160, 4), 16))  # type: ignore[arg-type]
    assert rates.seen == pytest.approx([0.05, 0.1, 0.1, 0.05])


@pytest.mark.parametrize(
    ("arguments", "share_of_peak"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 0.5]),  # the default rate falls over the last quarter
        ({"lr": 0.01}, [1] * 8),  # a given rate stays as it is
        ({"lr": 0.01, "lr_decay_steps": "auto"}, [1, 1, 1, 1, 1, 1, 1, 0.5]),
        ({"lr_decay_steps": 0}, [1] * 8),
        ({"lr_warmup_steps": 7}, [(i + 1) / 7 for i in range(7)] + [1]),  # one step is left
    ],
)
def test_the_default_rate_falls_in_the_last_quarter_and_a_given_one_does_not(
    arguments: dict[str, Any], share_of_peak: list[float]
) -> None:
    rates, sae = LearningRates(), free_sae(4, 6, **arguments)
    trainer = quiet_trainer(max_steps=8, callbacks=[rates])
    trainer.fit(sae, DataLoader(torch.randn(160, 4), 16))  # type: ignore[arg-type]
    assert rates.seen == pytest.approx([sae.lr * share for share in share_of_peak])


def test_a_class_that_has_the_decay_as_an_argument_of_its_own_notes_the_actual_one() -> None:
    class Mine(ReLUSAE):
        def __init__(self, d_in: int, d_sae: int, lr_decay_steps: int | None = None) -> None:
            super().__init__(d_in, d_sae, lr_decay_steps=lr_decay_steps)
            self.save_hyperparameters()

    assert Mine(4, 6).hparams["lr_decay_steps"] == "auto"


def test_tied_saes_have_no_decay_by_default() -> None:
    assert TiedSAE(4, 6).lr_decay_steps == TiedSAE(4, 6, lr=0.1).lr_decay_steps == 0


def test_without_a_known_length_the_default_rate_is_constant() -> None:
    rates, sae = LearningRates(), free_sae(4, 6)
    trainer = quiet_trainer(max_epochs=1, callbacks=[rates])
    trainer.fit(sae, DataLoader(torch.randn(64, 4), 16))  # type: ignore[arg-type]
    assert rates.seen == [sae.lr] * 4


def test_a_loaded_sae_has_the_schedule_of_the_saved_one(tmp_path: Path) -> None:
    for arguments, decay in (({}, "auto"), ({"lr": 0.01}, 0), ({"lr_decay_steps": 3}, 3)):
        sae = free_sae(4, 6, **arguments)
        sae.save_pretrained(tmp_path / str(decay))
        assert sae.hparams["lr_decay_steps"] == decay  # for `load_from_checkpoint`
        again = load(tmp_path / str(decay))
        assert (again.lr, again.lr_decay_steps) == (sae.lr, sae.lr_decay_steps) == (sae.lr, decay)


def test_decay_needs_a_run_of_known_length() -> None:
    trainer = quiet_trainer(max_epochs=1)
    with pytest.raises(ValueError, match="`lr_decay_steps`=5 .* set `trainer.max_steps`"):
        trainer.fit(free_sae(4, 6, lr_decay_steps=5), DataLoader(torch.randn(32, 4)))  # type: ignore
    trainer = quiet_trainer(max_steps=6)
    with pytest.raises(ValueError, match="`lr_warmup_steps` .* at most .*=6 but got 2 \\+ 5"):
        trainer.fit(
            free_sae(4, 6, lr_warmup_steps=2, lr_decay_steps=5),
            DataLoader(torch.randn(32, 4)),  # type: ignore[arg-type]
        )


class GradientNorms(Callback):
    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.last = torch.nn.utils.get_total_norm(gradients).item()


@pytest.mark.parametrize(("own", "trainers", "expected"), [(0.5, None, 0.5), (0.5, 0.25, 0.25)])
def test_gradient_is_clipped_by_the_trainer_or_else_by_the_sae(
    own: float, trainers: float | None, expected: float
) -> None:
    norms = GradientNorms()
    sae = free_sae(4, 6, clip_grad_norm=own)
    trainer = quiet_trainer(max_steps=2, gradient_clip_val=trainers, callbacks=[norms])
    trainer.fit(sae, DataLoader(100 * torch.randn(64, 4), 16))  # type: ignore[arg-type]
    assert norms.last == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("own", "trainers"), [(None, None), (1.0, 0.0)])
def test_without_clipping_the_gradient_is_left_alone(
    own: float | None, trainers: float | None
) -> None:
    norms = GradientNorms()
    sae = free_sae(4, 6, clip_grad_norm=own)
    quiet_trainer(max_steps=2, callbacks=[norms], gradient_clip_val=trainers).fit(
        sae,
        DataLoader(100 * torch.randn(64, 4), 16),  # type: ignore[arg-type]
    )
    assert norms.last > 10


def test_width_of_the_data_must_be_the_width_of_the_sae() -> None:
    with pytest.raises(ValueError, match="`d_in` to be 4, .* but got 5: build the SAE with"):
        quiet_trainer(max_steps=1).fit(free_sae(5, 6), datamodule=Activations(torch.randn(16, 4)))
    with pytest.raises(ValueError, match=r"d_in=5 but got shape \(2, 4\)"):
        free_sae(5, 6).encode(torch.randn(2, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_at_activations_that_are_not_finite(value: float) -> None:
    x = torch.randn(64, 4)
    x[40, 1] = value  # in the third batch of 16
    with pytest.raises(FloatingPointError, match="at optimizer step 2; 1 of the batch's 16"):
        quiet_trainer(max_steps=4).fit(free_sae(4, 6), datamodule=Activations(x))


def test_training_stops_at_a_loss_that_is_not_finite() -> None:
    sae = free_sae(4, 6)
    with torch.no_grad():
        sae.W_dec.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="activations are finite: lower `lr`"):
        quiet_trainer(max_steps=4).fit(sae, datamodule=Activations(torch.randn(64, 4)))


def test_a_latent_is_dead_after_so_many_activations_without_firing() -> None:
    sae = free_sae(4, 3, lr=1e-12, dead_after=32)
    with torch.no_grad():
        sae.b_enc[:] = torch.tensor([100.0, -100.0, 100.0])
    quiet_trainer(max_steps=2).fit(sae, datamodule=Activations(torch.randn(32, 4)))
    assert sae.silent_for.tolist() == [0, 32, 0]
    assert sae.dead.tolist() == [False, True, False]


def test_held_out_metrics_are_those_of_the_whole_set_in_raw_space() -> None:
    sae, x = scaled_sae(), torch.randn(50, 4)
    results = quiet_trainer().test(sae, datamodule=Activations(x), verbose=False)[0]
    error = (sae(x) - x).pow(2).sum()
    assert results["test/mse"] == pytest.approx(error.item() / 50, rel=1e-5)
    total = (x - x.mean(0)).pow(2).sum()
    assert results["test/fvu"] == pytest.approx((error / total).item(), rel=1e-5)
    assert results["test/l0"] == pytest.approx((sae.encode(x) > 0).sum().item() / 50)
    frequency = (sae.encode(x) > 0).double().mean(0)
    assert sae.held_out_frequency is not None
    torch.testing.assert_close(sae.held_out_frequency, frequency)


def test_predict_gives_latents() -> None:
    sae, x = scaled_sae(), torch.randn(20, 4)
    f = torch.cat(quiet_trainer().predict(sae, datamodule=Activations(x)))  # type: ignore
    torch.testing.assert_close(f, sae.encode(x))


def test_bfloat16_autocast_trains_float32_weights() -> None:
    sae = free_sae(4, 6)
    before = sae.W_dec.detach().clone()
    trainer = quiet_trainer(max_steps=4, precision="bf16-mixed")
    trainer.fit(sae, datamodule=Activations(torch.randn(64, 4)))
    assert sae.W_dec.dtype == torch.float32
    assert not torch.equal(sae.W_dec, before)


def test_a_barebones_trainer_trains_the_same_weights_and_does_not_warn_of_each_log() -> None:
    data = Activations(torch.randn(64, 4))
    sae = scaled_sae(orthogonality_coefficient=1.0)
    saes = [sae, copy.deepcopy(sae)]
    quiet_trainer(max_steps=6).fit(saes[0], datamodule=data)
    bare = Trainer(accelerator="cpu", barebones=True, max_steps=6, limit_val_batches=0)
    with quiet():
        bare.fit(saes[1], datamodule=data)
    assert_same_weights(saes[1], saes[0])


def test_lightning_knows_in_which_hook_it_is() -> None:
    sae = free_sae()
    assert sae._current_fx_name is None
    sae._current_fx_name = "training_step"
    assert sae._current_fx_name == "training_step"
    assert "_current_fx_name" not in sae.state_dict()


@pytest.mark.parametrize(("name", "value"), [("d_in", 0), ("d_sae", -1), ("lr", 0.0)])
def test_sizes_and_rates_must_be_positive(name: str, value: float) -> None:
    arguments: dict[str, Any] = {"d_in": 4, "d_sae": 6, name: value}
    with pytest.raises(ValueError, match=f"`{name}` to be positive but got {value}"):
        ReLUSAE(**arguments)


def test_checkpoint_of_another_architecture_or_shape_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_steps=1)
    data = Activations(torch.randn(32, 4))
    trainer.fit(free_sae(4, 6), datamodule=data)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"W_dec \(7, 4\) against \(6, 4\).*set the `d_in`"):
        quiet_trainer(max_steps=2).fit(free_sae(4, 7), datamodule=data, ckpt_path=path)

    class OtherSAE(ReLUSAE):
        pass

    with pytest.raises(ValueError, match="checkpoint of `OtherSAE` but it holds `ReLUSAE`"):
        quiet_trainer(max_steps=2).fit(
            OtherSAE(4, 6, decoder_norm="free"), datamodule=data, ckpt_path=path
        )


def test_an_sae_with_its_defaults_brings_what_keeps_its_decoder_norm() -> None:
    torch.manual_seed(0)
    data = Activations(torch.randn(512, 4))
    given, brought = ReLUSAE(4, 6, lr=0.1), ReLUSAE(4, 6, lr=0.1)
    brought.load_state_dict(given.state_dict())
    trainer = quiet_trainer(max_steps=20)
    trainer.fit(brought, datamodule=data)
    quiet_trainer(max_steps=20, callbacks=DecoderNormProjection()).fit(given, datamodule=data)
    assert_same_weights(brought, given)
    torch.testing.assert_close(brought.W_dec.norm(dim=-1), torch.ones(6))
    trainer.fit(brought, datamodule=data)  # a second time, where the callback is there already
    assert sum(isinstance(c, DecoderNormProjection) for c in callbacks_of(trainer)) == 1


def test_a_callback_that_is_given_takes_the_place_of_the_one_brought() -> None:
    own = DecoderNormProjection()
    trainer = quiet_trainer(max_steps=1, callbacks=own)
    trainer.fit(ReLUSAE(4, 6), datamodule=Activations(torch.randn(32, 4)))
    assert [c for c in callbacks_of(trainer) if isinstance(c, DecoderNormProjection)] == [own]


def test_free_decoder_rows_bring_no_callback() -> None:
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(free_sae(), datamodule=Activations(torch.randn(32, 4)))
    assert not any(isinstance(c, DecoderNormProjection) for c in callbacks_of(trainer))


def test_a_checkpoint_of_another_hook_is_refused_and_of_other_text_warned_of(
    tmp_path: Path,
) -> None:
    data = Activations(torch.randn(32, 4))
    data.origin = {"hook_name": "here", "text": "one"}
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(free_sae(), datamodule=data)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    data.origin = {"hook_name": "there", "text": "one"}
    with pytest.raises(ValueError, match="`hook_name` to be here, .* but got there"):
        quiet_trainer().test(free_sae(), datamodule=data, ckpt_path=path, verbose=False)
    data.origin = {"hook_name": "here", "text": "other"}
    with pytest.warns(UserWarning, match="text one to other"):
        quiet_trainer().test(free_sae(), datamodule=data, ckpt_path=path, verbose=False)


@pytest.mark.parametrize("name", ["decoder_norm", "b_dec_init"])
def test_unknown_words_are_refused(name: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=f"`{name}` to be one of .* but got 'foo'"):
        ReLUSAE(4, 6, **{name: "foo"})  # type: ignore[arg-type]


def test_a_batch_that_is_no_tensor_is_refused(unchecked: None) -> None:
    batches = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=16)
    with pytest.raises(ValueError, match="a tensor of activations but got a list"):
        quiet_trainer(max_steps=1).fit(free_sae(), batches)


def test_fast_dev_run_needs_no_other_settings() -> None:
    sae = free_sae(lr_warmup_steps=100, lr_decay_steps=100)
    callbacks = [L1Warmup(100), RunCheckpoint()]
    trainer = quiet_trainer(fast_dev_run=True, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(sae, datamodule=Activations(torch.randn(32, 4)))
    assert trainer.global_step == 1
    assert not list(Path().iterdir())


def always(dense: bool) -> Layout:
    """A layout that stays as it is, whatever it sees."""
    return Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))


class InSight(ReLUSAE):
    """Notes how many rows its objective is given."""

    rows_are_independent = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[int] = []

    def objective(self, x: Tensor) -> Step:
        self.seen.append(len(x))
        return super().objective(x)


def trained(
    dense: bool, *, chunk_rows: int | None = None, batch_size: int = 24, accumulate: int = 1
) -> InSight:
    """An SAE after a few steps in double precision, in which only rounding is small."""
    torch.manual_seed(1)
    sae = InSight(
        4, 24, 0.3, lr=0.01, decoder_norm="free", b_dec_init="zero", chunk_rows=chunk_rows
    )
    sae.layout = always(dense)
    trainer = quiet_trainer(
        max_steps=6, precision="64-true", accumulate_grad_batches=accumulate, max_epochs=-1
    )
    trainer.fit(sae, datamodule=Activations(torch.randn(96, 4), batch_size))
    return sae


def assert_same_weights(found: ReLUSAE, expected: ReLUSAE) -> None:
    expected_state = expected.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected_state[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("dense", "chunk_rows", "seen"),
    [(True, 7, [7, 7, 7, 3]), (True, 24, [24]), (False, None, [24]), (False, 7, [24])],
)
def test_layouts_and_chunks_train_the_same_weights(
    dense: bool, chunk_rows: int | None, seen: list[int]
) -> None:
    expected, found = trained(dense=True), trained(dense, chunk_rows=chunk_rows)
    assert_same_weights(found, expected)
    assert found.seen == seen * 6
    assert found.layout.dense == dense


@pytest.mark.parametrize(("dense", "chunk_rows"), [(True, None), (True, 5), (False, 5)])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    dense: bool, chunk_rows: int | None
) -> None:
    found = trained(dense, chunk_rows=chunk_rows, batch_size=12, accumulate=2)
    expected = trained(dense, chunk_rows=chunk_rows)
    assert_same_weights(found, expected)


def test_rows_that_depend_on_each_other_are_never_split() -> None:
    class Dependent(InSight):
        rows_are_independent = False

    sae = Dependent(4, 24, decoder_norm="free", chunk_rows=7)
    sae.layout = always(dense=True)
    quiet_trainer(max_steps=2).fit(sae, datamodule=Activations(torch.randn(64, 4), 32))
    assert sae.seen == [32, 32]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_every_precision_trains_in_both_layouts(precision: Any, dense: bool) -> None:
    """Gradients are so large that they are clipped too."""
    sae = free_sae(4, 24, lr=0.05, chunk_rows=7)
    sae.layout, x = always(dense), 20 * torch.randn(96, 4)
    untrained = sae.objective(x).losses["squared_error"].item()
    trainer = quiet_trainer(max_steps=12, precision=precision, max_epochs=-1)
    trainer.fit(sae, datamodule=Activations(x))
    assert sae.float().objective(x).losses["squared_error"].item() < 0.9 * untrained


def test_a_checkpoint_keeps_the_layout(tmp_path: Path) -> None:
    class LayoutAtStart(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
            self.first = getattr(self, "first", module.layout.dense)

    data = Activations(torch.randn(64, 4))
    for dense in (True, False):
        sae, path, start = free_sae(), tmp_path / f"{dense}.ckpt", LayoutAtStart()
        sae.layout = always(dense)
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(sae, datamodule=data)
        trainer.save_checkpoint(path)
        trainer = quiet_trainer(max_epochs=2, callbacks=[start])
        trainer.fit(free_sae(), datamodule=data, ckpt_path=path)
        assert start.first == dense
