import csv
import io
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_sae.architectures.decoder_norm import DecoderNormProjection
from lightning_sae.architectures.relu import ReLUSAE
from lightning_sae.callbacks.l1_warmup import L1Warmup
from lightning_sae.callbacks.resampling import DeadFeatureResampling
from lightning_sae.data import ToyDataModule

# These runs train only, their data is at hand, and norms matter to none of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
D = 6
WEIGHTS = {"W_enc": 1, "W_dec": 0, "b_enc": 0}  # the axis of latents


class Mirror(ReLUSAE):
    """Latent j reads and writes coordinate j, so a batch says which latents fire; hardly learns."""

    def __init__(self, **kwargs):
        # A rate so small that weights do not move, while moments are what they always are.
        still = {"lr": 1e-30, "b_dec_init": "zero"}
        super().__init__(D, D, l1_coefficient=1.0, **{**still, **kwargs})
        with torch.no_grad():
            self.W_enc.copy_(torch.eye(D))
            self.W_dec.copy_(torch.eye(D))


class Resampled(DummyLogger):
    """Notes how many latents were replaced."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def log_metrics(self, metrics, step=None):
        self.counts += [metrics["train/resampled"]] if "train/resampled" in metrics else []


class Snapshot(Callback):
    """Weights and moments at the end of each batch, as the callbacks before it left them."""

    def __init__(self):
        self.taken = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        adam = trainer.optimizers[0]
        state = {name: w.detach().clone() for name, w in pl_module.named_parameters()}
        for name, w in pl_module.named_parameters():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                state[f"{name}.{key}"] = adam.state[w][key].clone() if w in adam.state else None
        self.taken.append(state | {"silent_for": pl_module.silent_for.clone()})


def build_trainer(*callbacks: Callback, **kwargs) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **flags)


def loader(batches: torch.Tensor) -> DataLoader:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def firing(*latents: int, n: int = 4) -> torch.Tensor:
    """A batch on which exactly these latents of a `Mirror` fire, each rebuilt perfectly or not."""
    x = -1 - torch.rand(n, D)
    x[:, list(latents)] *= -1
    return x


def fit(callback, batches, sae=None, **kwargs):
    """The SAE, and its state before and after the callback's turn on the last batch."""
    sae, before, after = sae or Mirror(), Snapshot(), Snapshot()
    build_trainer(before, callback, after, **kwargs).fit(sae, loader(batches))
    return sae, before.taken[-1], after.taken[-1]


# Four steps of which the last is not done, for nothing is replaced at the very end of a run.
SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"accumulate_grad_batches": 2}, id="accumulate"),
    pytest.param({"precision": "bf16-mixed"}, id="bf16"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_by_loss_squared_the_end_state_is_the_closed_form(settings):
    sae = Mirror()
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.3, 0.2, D))
        sae.b_enc.copy_(torch.linspace(0.1, 0.2, D))
        sae.W_enc[:, :2] *= torch.tensor([2.0, 4.0])
        sae.input_scale.fill_(2.0)
    # All latents fire at first and have moments; in the window of one step only 0 and 1 do.
    n = settings.get("accumulate_grad_batches", 1)
    batches = torch.stack([firing(*range(D))] * 3 * n + [firing(0, 1)] * n)
    last = torch.tensor([3.0, 2.0, -1.0, -2.0, -3.0, -4.0])
    batches[-1, -1] = last
    callback = DeadFeatureResampling(4, window=1, n_inputs=1)
    sae, before, after = fit(callback, batches, sae, **settings)

    seen = 2 * last - torch.linspace(-0.3, 0.2, D)
    direction = (seen / seen.norm()).expand(4, D)
    torch.testing.assert_close(after["W_dec"][2:], direction, atol=1e-6, rtol=0)
    # The living encoder rows have norms 2 and 4.
    torch.testing.assert_close(after["W_enc"][:, 2:].T, 0.2 * 3 * direction, atol=1e-6, rtol=0)
    assert torch.equal(after["b_enc"][2:], torch.zeros(4))
    assert torch.equal(after["silent_for"][2:], torch.zeros(4, dtype=torch.int64))
    assert (before["silent_for"][2:] > 0).all()
    assert_living_are_untouched(before, after, living=slice(0, 2))


@pytest.mark.parametrize("settings", SETTINGS)
def test_reinitialised_the_end_state_is_the_closed_form(settings):
    n = settings.get("accumulate_grad_batches", 1)
    # In 32 inputs of the window, latent 2 fires 8 times, latent 3 fires 4 times, 4 and 5 never.
    batches = torch.stack([firing(*range(D), n=16)] * 2 * n + [firing(0, 1, n=16)] * 2 * n)
    batches[-1, :8, 2] = 1
    batches[-2, :4, 3] = 1
    batches = batches if n == 1 else torch.cat([batches[:-4], batches[-4:].view(4, 16, D)])
    frequency = 8 / (32 * n)
    callback = DeadFeatureResampling(4, "reinitialize", window=2, min_frequency=frequency)
    _, before, after = fit(callback, batches, **settings)

    rows = after["W_dec"][3:]
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3))
    assert torch.equal(after["W_enc"][:, 3:].T, rows)
    assert (rows @ rows.T - torch.eye(3)).abs().max() < 0.999  # not the same row over again
    assert torch.equal(after["b_enc"][3:], torch.zeros(3))
    assert_living_are_untouched(before, after, living=slice(0, 3))


def assert_living_are_untouched(before, after, living):
    """And the moments of the others are zero where they were not."""
    for name, axis in WEIGHTS.items():
        for key in (name, f"{name}.exp_avg", f"{name}.exp_avg_sq"):
            was, now = (state[key].movedim(axis, 0) for state in (before, after))
            assert torch.equal(was[living], now[living]), key
            if key != name:
                assert (was[living.stop :] != 0).any(), key
                assert (now[living.stop :] == 0).all(), key
        assert torch.equal(before[f"{name}.step"], after[f"{name}.step"])
    assert torch.equal(before["silent_for"][living], after["silent_for"][living])
    for key in ("b_dec", "b_dec.exp_avg", "b_dec.exp_avg_sq"):
        assert torch.equal(before[key], after[key])


def test_a_firing_in_any_micro_batch_of_the_window_counts_and_none_before_it():
    batches = torch.stack(
        [firing(*range(D))] * 3 + [firing(0, 5)]  # two steps, before the window
        + [firing(0, 1), firing(0), firing(0, 2), firing(0)]
    )  # fmt: skip
    callback = DeadFeatureResampling(4, "reinitialize", window=2)
    _, before, after = fit(callback, batches, accumulate_grad_batches=2)
    changed = (before["W_dec"] != after["W_dec"]).any(-1)
    assert changed.tolist() == [False, False, False, True, True, True]


def test_inputs_that_are_rebuilt_well_are_not_drawn():
    batches = firing(0, 1, 2, 3).clamp_min(0).repeat(2, 1, 1)  # these have no error at all
    hard = torch.tensor([1.0, 0, 0, 0, -2.0, 0])
    batches[0, 1] = hard
    sae = Mirror()
    with torch.no_grad():
        sae.b_enc[4:] = -1
    _, before, after = fit(DeadFeatureResampling(2, n_inputs=100), batches, sae)
    expected = (hard / hard.norm()).expand(2, D)
    torch.testing.assert_close(after["W_dec"][4:], expected)
    assert torch.equal(before["W_dec"][:4], after["W_dec"][:4])


@pytest.mark.parametrize(("n_inputs", "accumulate"), [(1, 1), (3, 1), (4, 2), (5, 1), (7, 2)])
def test_only_the_latest_inputs_are_drawn_from_and_few_more_are_kept(n_inputs, accumulate):
    generator = torch.Generator().manual_seed(0)
    batches = -torch.rand(8, 4, D, generator=generator) - 1
    kept = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(sum(map(len, callback._inputs)))

    # All latents are dead and as many inputs are kept: without replacement all are drawn.
    callback = DeadFeatureResampling(8 // accumulate, n_inputs=n_inputs)
    sae = ReLUSAE(D, n_inputs, lr=1e-30, b_dec_init="zero")
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    after = Snapshot()
    trainer = build_trainer(Watch(), callback, after, accumulate_grad_batches=accumulate)
    trainer.fit(sae, loader(batches))
    latest = batches.flatten(0, 1)[-n_inputs:]
    expected = latest / latest.norm(dim=-1, keepdim=True)
    drawn = after.taken[-1]["W_dec"]
    assert torch.cdist(drawn, expected).min(0).values.max() < 1e-6
    assert torch.cdist(drawn, expected).min(1).values.max() < 1e-6
    assert max(kept) < n_inputs + 4


def test_what_is_kept_does_not_change_when_the_batch_is_overwritten():
    class Overwrite(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            batch.fill_(-5)
            outputs["squared_error"].zero_()

    batches = torch.tensor([[[-1.0, -v, -v, -1, -1, -1]] * 2 for v in (1, 2, 3)])
    after = Snapshot()
    callbacks = DeadFeatureResampling(3, n_inputs=6), Overwrite(), after
    build_trainer(*callbacks).fit(Mirror(), loader(batches))
    seen = torch.tensor([[-1.0, -v, -v, -1, -1, -1] for v in (1, 1, 2, 2, 3, 3)])
    seen /= seen.norm(dim=-1, keepdim=True)
    rows = after.taken[-1]["W_dec"]
    torch.testing.assert_close(rows[rows[:, 0].argsort()], seen, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheme", ["loss_squared", "reinitialize"])
def test_free_decoder_rows_get_the_mean_norm_of_the_living(scheme):
    sae = Mirror(decoder_norm="free")
    with torch.no_grad():
        sae.W_dec *= torch.tensor([3.0, 5.0, 7, 7, 7, 7])[:, None]
    batches = firing(0, 1).repeat(2, 1, 1)
    _, _, after = fit(DeadFeatureResampling(2, scheme), batches, sae)
    torch.testing.assert_close(after["W_dec"][2:].norm(dim=-1), torch.full((4,), 4.0))
    encoder_norm = 0.2 if scheme == "loss_squared" else 4.0
    torch.testing.assert_close(after["W_enc"][:, 2:].norm(dim=0), torch.full((4,), encoder_norm))


def test_with_all_latents_dead_the_living_norm_is_taken_as_one():
    sae = Mirror()
    with torch.no_grad():
        sae.W_enc *= 50
    _, _, after = fit(DeadFeatureResampling(2), firing(n=16).repeat(2, 1, 1), sae)
    torch.testing.assert_close(after["W_dec"].norm(dim=-1), torch.ones(D))
    torch.testing.assert_close(after["W_enc"].norm(dim=0), torch.full((D,), 0.2))


@pytest.mark.parametrize("scheme", ["loss_squared", "reinitialize"])
def test_with_no_latent_dead_nothing_changes(scheme):
    callback = DeadFeatureResampling(2, scheme)
    _, before, after = fit(callback, firing(*range(D)).repeat(2, 1, 1))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_more_dead_latents_than_inputs_share_them():
    batches = firing(0).repeat(2, 1, 1)
    _, _, after = fit(DeadFeatureResampling(2, n_inputs=2), batches)
    seen = batches[-1, -2:] / batches[-1, -2:].norm(dim=-1, keepdim=True)
    assert torch.cdist(after["W_dec"][1:], seen).min(1).values.max() < 1e-6


@pytest.mark.parametrize(
    ("limits", "max_steps", "expected"),
    [
        ({}, -1, [3, 6, 9, 12]),
        ({}, 12, [3, 6, 9]),  # what is replaced after the last step would never be trained
        ({"max_resamplings": 2}, -1, [3, 6]),
        ({"stop_after_step": 6}, -1, [3, 6]),
        ({"stop_after_step": 8}, -1, [3, 6]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_acts_on_these_steps_and_logs_them(limits, max_steps, expected, accumulate, tmp_path):
    trainer = build_trainer(
        DeadFeatureResampling(3, "reinitialize", **limits),
        max_steps=max_steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=5,
    )
    # Nothing fires before the first time.
    sae = Mirror()
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    before = sae.W_dec.clone()
    trainer.fit(sae, loader(firing().repeat(12 * accumulate, 1, 1)))
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/resampled"]]
    assert [int(row["step"]) + 1 for row in rows] == expected
    assert float(rows[0]["train/resampled"]) == D
    assert not torch.equal(before, sae.W_dec)


def run_of(n_epochs: int, seed: int = 0):
    """A real run: it learns, latents die and are replaced after steps 4 and 8, six an epoch."""
    torch.manual_seed(seed)
    sae = ReLUSAE(D, 48, l1_coefficient=0.5, lr=0.01)
    with torch.no_grad():
        sae.b_enc.uniform_(-3, -1.5)
    callbacks = [
        DecoderNormProjection(),
        L1Warmup(9),
        DeadFeatureResampling(4, n_inputs=40, seed=3, max_resamplings=2),
    ]
    return sae, build_trainer(*callbacks, max_epochs=n_epochs, accumulate_grad_batches=2)


def test_a_resumed_run_is_exact_with_a_window_that_straddles_the_checkpoint(tmp_path):
    batches = torch.randn(12, 8, D, generator=torch.Generator().manual_seed(5))
    straight, trainer = run_of(2)
    trainer.fit(straight, loader(batches))
    moments = trainer.optimizers[0].state_dict()["state"]

    stopped, trainer = run_of(1)
    trainer.fit(stopped, loader(batches))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    state = saved["DeadFeatureResampling"]
    assert (state["n_counted"], state["n_done"]) == (32, 1)
    assert sum(map(len, state["inputs"])) == 32  # of the 40 drawn from after step 8

    resumed, trainer = run_of(2, seed=1)
    snapshot = Snapshot()
    trainer.callbacks.append(snapshot)
    trainer.fit(resumed, loader(batches), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 12

    replaced = (snapshot.taken[3]["silent_for"] == 0) & (snapshot.taken[2]["silent_for"] > 0)
    assert replaced.sum() > 2
    for name, expected in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name
    for index, expected in moments.items():
        for key, value in expected.items():
            assert torch.equal(trainer.optimizers[0].state_dict()["state"][index][key], value), key


def test_the_same_callback_starts_afresh_in_another_fit():
    batches = torch.stack([firing(0) for _ in range(10)])
    callback, ends = DeadFeatureResampling(4, max_resamplings=2), []
    for _ in range(2):
        sae, _, _ = fit(callback, batches)
        ends.append(sae.W_dec)
    assert (ends[0][1:] != torch.eye(D)[1:]).any(-1).all()
    assert torch.equal(*ends)


def test_its_state_is_read_without_unpickling_before_any_fit():
    file = io.BytesIO()
    torch.save(DeadFeatureResampling(4).state_dict(), file)
    file.seek(0)
    DeadFeatureResampling(4).load_state_dict(torch.load(file, weights_only=True))


class OneOfTwo(SingleDeviceStrategy):
    """One rank of two; on the other, latents `FIRED` fire once in each batch."""

    FIRED, SENT = (1, 3), torch.eye(D)[[5, 4, 3, 2]]

    def __init__(self, rank: int):
        super().__init__("cpu")
        self.rank, self.received = rank, None

    @property
    def is_global_zero(self):
        return self.rank == 0

    def reduce(self, tensor, group=None, reduce_op="mean"):
        if tensor.shape == (D,) and tensor.dtype == torch.int64:
            tensor[list(self.FIRED)] += 1
        return tensor

    def broadcast(self, obj, src=0):
        if not isinstance(obj, torch.Tensor):
            return obj
        self.received = obj
        return obj if self.rank == 0 else self.SENT[: D - 3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scheme", ["loss_squared", "reinitialize"])
def test_ranks_share_counts_and_directions(rank, scheme):
    outputs_seen = []

    class CountsOfThisRank(Mirror):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            outputs_seen.append(outputs["fired"].copy_((self.encode(batch) != 0).sum(0)))
            return outputs

    strategy = OneOfTwo(rank)
    batches = firing(0, 1).repeat(2, 1, 1)
    callback = DeadFeatureResampling(2, scheme)
    _, before, after = fit(callback, batches, CountsOfThisRank(), strategy=strategy)
    assert outputs_seen[-1].tolist() == [4, 4, 0, 0, 0, 0]  # others read them too
    changed = (before["W_dec"] != after["W_dec"]).any(-1)
    assert changed[[0, 1, 3]].tolist() == [False] * 3  # 3 fired on the other rank only
    dead = [2, 4, 5]
    sent = strategy.received if rank == 0 else strategy.SENT[:3]
    torch.testing.assert_close(after["W_dec"][dead], sent)


@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_by_loss_squared_dead_latents_of_a_real_run_find_features():
    """A learning rate that is too high kills latents; without resampling 45 of 48 are found."""
    torch.manual_seed(0)
    data = ToyDataModule(
        48, 24, directions="random", probabilities=0.05, batch_size=128, scale=True
    )
    sae, log = ReLUSAE(24, 64, l1_coefficient=2.0, lr=0.05, lr_decay_steps=100), Resampled()
    resampling = DeadFeatureResampling(60, window=30, stop_after_step=240)
    flags = {"max_epochs": -1, "max_steps": 400, "limit_val_batches": 0, "logger": log}
    build_trainer(resampling, **flags).fit(sae, datamodule=data)
    assert len(log.counts) == 4
    assert sum(log.counts) > 5
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    assert ((rows @ data.features.T).amax(0) > 0.9).sum() > 45
