import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_sae.architectures.decoder_norm import DecoderNormProjection
from lightning_sae.architectures.relu import ReLUSAE

# These runs train only, and their data is at hand.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

LR = 0.02


def build_sae(**kwargs) -> ReLUSAE:
    torch.manual_seed(1)
    return ReLUSAE(7, 40, l1_coefficient=0.1, lr=LR, b_dec_init="zero", **kwargs)


def build_trainer(*callbacks: Callback, **kwargs) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **flags)


def batches() -> DataLoader:
    x = torch.randn(12, 16, 7, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


def norm_error(sae: LightningModule) -> float:
    return (sae.get_parameter("W_dec").detach().double().norm(dim=-1) - 1).abs().max().item()


class Counting(DecoderNormProjection):
    def __init__(self):
        super().__init__()
        self.n_projected = self.n_renormalised = 0

    def project(self, gradient, w):
        super().project(gradient, w)
        self.n_projected += 1

    def renormalise(self, w):
        super().renormalise(w)
        self.n_renormalised += 1


class ProjectionAlone(DecoderNormProjection):
    def renormalise(self, w):
        pass


class NormWatch(Callback):
    """Norm errors after each batch; `before_data` also before the first."""

    def __init__(self):
        self.errors, self.before_data = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.before_data = norm_error(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.errors.append(norm_error(pl_module))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_are_unit_after_every_step_and_both_halves_happen_once_in_each(precision, accumulate):
    sae, callback, watch = build_sae(), Counting(), NormWatch()
    before = sae.W_dec.detach().clone()
    trainer = build_trainer(
        callback, watch, precision=precision, accumulate_grad_batches=accumulate
    )
    trainer.fit(sae, batches())
    assert max(watch.errors) < 1e-6
    assert callback.n_projected == callback.n_renormalised == trainer.global_step
    assert trainer.global_step == 12 // accumulate
    assert (sae.W_dec - before).abs().max() > LR  # it did learn


def test_projecting_the_gradient_alone_lets_the_norms_drift():
    sae, watch = build_sae(), NormWatch()
    build_trainer(ProjectionAlone(), watch).fit(sae, batches())
    assert watch.errors[-1] > 0.01
    assert watch.errors[-1] > watch.errors[0] > 1e-4


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_projection_then_clipping_then_adam_then_unit_norm(clip, accumulate):
    sae, by_hand = build_sae(clip_grad_norm=clip), build_sae()
    trainer = build_trainer(DecoderNormProjection(), accumulate_grad_batches=accumulate)
    trainer.fit(sae, batches())

    optimizer = Adam(by_hand.parameters(), lr=LR)
    for step in range(0, 12, accumulate):
        optimizer.zero_grad()
        for batch in batches().dataset[step : step + accumulate]:
            loss = sum(by_hand.objective(batch).losses.values()) / accumulate
            loss.backward()
        with torch.no_grad():
            for row, gradient in zip(by_hand.W_dec, by_hand.W_dec.grad, strict=True):
                gradient -= (gradient @ row) * row
        if clip:
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            by_hand.W_dec /= by_hand.W_dec.norm(dim=-1, keepdim=True)

    for name, expected in by_hand.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name), expected, atol=1e-6, rtol=0)


def test_the_gradient_of_a_large_decoder_is_projected_row_by_row():
    """It is done in blocks of rows, of which the last is a short one."""
    w = torch.nn.functional.normalize(torch.randn(2500, 7), dim=-1)
    gradient = torch.randn(2500, 7)
    expected = torch.stack([g - (g @ row) * row for g, row in zip(gradient, w, strict=True)])
    DecoderNormProjection().project(gradient, w)
    torch.testing.assert_close(gradient, expected)


def test_training_starts_from_unit_rows():
    sae, watch = build_sae(), NormWatch()
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 3, 40)[:, None]
    build_trainer(DecoderNormProjection(), watch).fit(sae, batches())
    assert watch.before_data < 1e-6


def test_a_resumed_run_is_exact(tmp_path):
    straight, stopped, resumed = build_sae(), build_sae(), build_sae()
    build_trainer(DecoderNormProjection(), max_epochs=2).fit(straight, batches())

    first = build_trainer(DecoderNormProjection())
    first.fit(stopped, batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = build_trainer(DecoderNormProjection(), max_epochs=2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")

    assert second.global_step == 24
    for name, expected in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), expected), name


def test_a_step_that_the_gradient_scaler_skips_is_not_followed_by_a_renormalisation():
    class CountMoves(Callback):
        n_moves = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = pl_module.W_dec.detach().clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.n_moves += not torch.equal(self.before, pl_module.W_dec)

    # After three steps the scale is such that gradients overflow; after a skip it is 1 again.
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=1.0, growth_factor=2.0**127, backoff_factor=2.0**-127, growth_interval=3
    )
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    callback, moves = Counting(), CountMoves()
    build_trainer(callback, moves, plugins=[precision]).fit(build_sae(), batches())
    assert callback.n_renormalised == moves.n_moves == 9


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed_from_the_optimizer(fails):
    class Failing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert trainer.optimizers[0]._optimizer_step_post_hooks
            if fails and batch_idx == 3:
                raise RuntimeError("no more")

    trainer = build_trainer(DecoderNormProjection(), Failing())
    optimizers = []
    trainer.callbacks.append(Grab(optimizers))
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            trainer.fit(build_sae(), batches())
    else:
        trainer.fit(build_sae(), batches())
    assert len(optimizers) == 1
    assert not optimizers[0]._optimizer_step_post_hooks


class Grab(Callback):
    def __init__(self, optimizers):
        self.optimizers = optimizers

    def on_train_start(self, trainer, pl_module):
        self.optimizers.extend(trainer.optimizers)


def test_a_free_decoder_is_refused():
    with pytest.raises(ValueError, match='set `decoder_norm="unit"` or remove the callback'):
        build_trainer(DecoderNormProjection()).fit(build_sae(decoder_norm="free"), batches())


def test_two_of_them_are_refused():
    trainer = build_trainer(DecoderNormProjection(), DecoderNormProjection())
    with pytest.raises(ValueError, match="Expected one `DecoderNormProjection`.*remove all but"):
        trainer.fit(build_sae(), batches())


def test_a_module_without_a_decoder_is_refused():
    class Line(LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(7))

        def training_step(self, batch, batch_idx):
            return (batch @ self.w).sum()

        def configure_optimizers(self):
            return Adam(self.parameters())

    with pytest.raises(ValueError, match="decoder `W_dec`.*but Line has none: train an SAE or"):
        build_trainer(DecoderNormProjection()).fit(Line(), batches())


def test_it_tells_the_sae_that_it_keeps_the_norms():
    assert DecoderNormProjection.constrains_decoder_norm
