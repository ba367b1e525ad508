import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE, TiedSAE
from lightning_sae.callbacks import AuxThresholdWarmup

# Norms matter to none of these runs.


class Watched(TiedSAE):
    """Notes the share, the loss at that share and how many batches its peaks have seen."""

    def __init__(self, **kwargs):
        torch.manual_seed(1)
        super().__init__(5, 9, orthogonality_coefficient=3.0, **kwargs)
        self.shares, self.losses, self.seen = [], [], []

    def objective(self, x):
        step = super().objective(x)
        self.shares.append(self.orthogonality_scale)
        self.losses.append(step.losses["orthogonality"].item())
        self.seen.append(self.peaks.n_batches.item())
        return step


def build_trainer(*callbacks: Callback, **kwargs) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **flags)


def batches() -> DataLoader:
    x = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_there_is_no_loss_at_first_and_then_it_rises_linearly_to_one_and_stays(precision):
    sae, trainer = Watched(), build_trainer(AuxThresholdWarmup(2, 3), precision=precision)
    trainer.fit(sae, batches())
    assert sae.shares == pytest.approx([0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert sae.losses[:2] == [0.0, 0.0]
    assert min(sae.losses[2:]) > 0
    assert sae.seen == [0, 1, 2, 3, 4, 5]  # how strongly latents fire is noted all the time
    assert trainer.callback_metrics["train/orthogonality_scale"] == 1.0


def test_the_share_multiplies_both_weight_and_threshold():
    sae, x = Watched(), torch.randn(50, 5)
    sae.peaks.recent[0] = sae.encode(x).amax(0)
    f = sae.encode(x)
    cosines = torch.nn.functional.cosine_similarity(
        sae.encoder_input(x).unsqueeze(1), sae.W_dec.unsqueeze(0), dim=-1
    )
    for share in (0.3, 1.0):
        sae.orthogonality_scale = share
        low = f <= share * 0.7 * f.amax(0)
        expected = share * 3.0 * (cosines.square() * low).mean().item()
        assert sae.objective(x).losses["orthogonality"].item() == pytest.approx(expected)


def test_micro_batches_of_a_step_share_one_value():
    sae = Watched()
    build_trainer(AuxThresholdWarmup(1, 4), accumulate_grad_batches=2).fit(sae, batches())
    assert sae.shares == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]


def test_a_resumed_fit_continues_the_schedule(tmp_path):
    first = build_trainer(AuxThresholdWarmup(4, 4))
    first.fit(Watched(), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)

    resumed = Watched()
    second = build_trainer(AuxThresholdWarmup(4, 4), max_epochs=2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.shares == [3 / 4, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_schedule_added_to_a_resumed_run_begins_where_it_is_added(tmp_path):
    first = build_trainer()
    first.fit(Watched(), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    callback, resumed, afresh = AuxThresholdWarmup(3, 6), Watched(), Watched()
    second = build_trainer(callback, max_epochs=2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    build_trainer(callback).fit(afresh, batches())
    assert resumed.shares == afresh.shares == pytest.approx([0, 0, 0, 1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("fails", [False, True])
def test_the_whole_loss_is_left_behind(fails):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.orthogonality_scale < 1
            if fails and batch_idx == 2:
                raise RuntimeError("no more")

    sae, trainer = Watched(), build_trainer(AuxThresholdWarmup(10, 90), Failing())
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            trainer.fit(sae, batches())
    else:
        trainer.fit(sae, batches())
    assert sae.orthogonality_scale == 1.0


@pytest.mark.parametrize(
    ("delay", "warmup", "message"),
    [
        (-1, 3, "`delay_steps` to be at least 0 .* but got -1"),
        (0, 0, "`warmup_steps` to be at least 1 .* but got 0"),
    ],
)
def test_lengths_out_of_range_are_refused(delay, warmup, message):
    with pytest.raises(ValueError, match=message):
        AuxThresholdWarmup(delay, warmup)


def test_a_schedule_longer_than_the_run_is_refused():
    trainer = build_trainer(AuxThresholdWarmup(3, 3), max_steps=5)
    with pytest.raises(ValueError, match="at most `trainer.max_steps`=5 but got 3 . 3: shorten"):
        trainer.fit(Watched(), batches())


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(5))

    def training_step(self, batch, batch_idx):
        return (batch @ self.w).sum()

    def configure_optimizers(self):
        return Adam(self.parameters())


@pytest.mark.parametrize("build", [lambda: ReLUSAE(5, 9), Line])
def test_a_module_without_the_loss_is_refused(build):
    with pytest.raises(
        ValueError, match="orthogonality but .* has none: set its `orthogonality_coeff"
    ):
        build_trainer(AuxThresholdWarmup(1, 2)).fit(build(), batches())


def test_two_of_them_are_refused():
    class Mine(AuxThresholdWarmup):
        pass

    with pytest.raises(ValueError, match="Expected one `AuxThresholdWarmup`.*remove all but one"):
        build_trainer(AuxThresholdWarmup(1, 2), Mine(1, 2)).fit(Watched(), batches())
