import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_sae.architectures.relu import ReLUSAE
from lightning_sae.callbacks.l1_warmup import L1Warmup

# These runs train only, their data is at hand, and norms matter to none of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Watched(ReLUSAE):
    """Notes the share and the penalty of each batch."""

    def __init__(self, **kwargs):
        torch.manual_seed(1)
        super().__init__(5, 9, l1_coefficient=3.0, **kwargs)
        self.shares, self.penalties = [], []

    def objective(self, x):
        step = super().objective(x)
        self.shares.append(self.penalty_scale)
        self.penalties.append((step.losses["l1"] / (3.0 * step.f.row_sums().mean())).item())
        return step


def build_trainer(*callbacks: Callback, **kwargs) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **flags)


def batches() -> DataLoader:
    x = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_share_rises_linearly_to_one_and_stays(precision):
    sae, trainer = Watched(), build_trainer(L1Warmup(4), precision=precision)
    trainer.fit(sae, batches())
    assert sae.shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert sae.penalties == pytest.approx(sae.shares, rel=1e-2)
    assert trainer.callback_metrics["train/penalty_scale"] == 1.0


def test_micro_batches_of_a_step_share_one_value():
    sae = Watched()
    build_trainer(L1Warmup(4), accumulate_grad_batches=2).fit(sae, batches())
    assert sae.shares == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_a_resumed_fit_continues_the_schedule(tmp_path):
    first = build_trainer(L1Warmup(8))
    first.fit(Watched(), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)

    resumed = Watched()
    second = build_trainer(L1Warmup(8), max_epochs=2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.shares == [7 / 8, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_warm_up_added_to_a_resumed_run_begins_where_it_is_added_and_resumes(tmp_path):
    first = build_trainer()
    first.fit(Watched(), batches())
    first.save_checkpoint(tmp_path / "1.ckpt")

    second, sae = build_trainer(L1Warmup(12), max_epochs=2), Watched()
    second.fit(sae, batches(), ckpt_path=tmp_path / "1.ckpt")
    assert sae.shares == [k / 12 for k in range(1, 7)]
    second.save_checkpoint(tmp_path / "2.ckpt")

    third, sae = build_trainer(L1Warmup(12), max_epochs=3), Watched()
    third.fit(sae, batches(), ckpt_path=tmp_path / "2.ckpt")
    assert sae.shares == [k / 12 for k in range(7, 13)]


def test_another_fit_with_the_same_callback_starts_a_warm_up_of_its_own(tmp_path):
    first = build_trainer()
    first.fit(Watched(), batches())
    first.save_checkpoint(tmp_path / "1.ckpt")

    callback, resumed, afresh = L1Warmup(12), Watched(), Watched()
    build_trainer(callback, max_epochs=2).fit(resumed, batches(), ckpt_path=tmp_path / "1.ckpt")
    build_trainer(callback).fit(afresh, batches())
    assert resumed.shares[0] == afresh.shares[0] == 1 / 12  # one began at step 6, one at 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_whole_penalty_is_left_behind(fails):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.penalty_scale < 1
            if fails and batch_idx == 2:
                raise RuntimeError("no more")

    sae, trainer = Watched(), build_trainer(L1Warmup(100), Failing())
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            trainer.fit(sae, batches())
    else:
        trainer.fit(sae, batches())
    assert sae.penalty_scale == 1.0


@pytest.mark.parametrize("n_steps", [0, -3, 0.0, 1.0, 1.5, float("nan"), True])
def test_what_is_neither_steps_nor_a_share_of_the_run_is_refused(n_steps):
    with pytest.raises(ValueError, match=f"`n_steps` to be at least 1 .*share.* but got {n_steps}"):
        L1Warmup(n_steps)


def test_a_warm_up_longer_than_the_run_is_refused():
    trainer = build_trainer(L1Warmup(6), max_steps=5)
    with pytest.raises(ValueError, match="at most `trainer.max_steps`=5 but got 6: shorten"):
        trainer.fit(Watched(), batches())


def test_a_module_without_a_penalty_is_refused():
    class Line(LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(5))

        def training_step(self, batch, batch_idx):
            return (batch @ self.w).sum()

        def configure_optimizers(self):
            return Adam(self.parameters())

    with pytest.raises(ValueError, match="sparsity penalty but Line has none"):
        build_trainer(L1Warmup(2)).fit(Line(), batches())


def test_two_of_them_are_refused():
    class Mine(L1Warmup):
        pass

    with pytest.raises(ValueError, match="Expected one `L1Warmup` but.*remove all but one"):
        build_trainer(L1Warmup(2), Mine(2)).fit(Watched(), batches())
