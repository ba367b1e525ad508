import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sae import ReLUSAE, ToyDataModule, load
from lightning_sae.cli import main
from lightning_sae.data.toy import stream as toy_stream
from lightning_sae.data.toy.firing import DenseFiring, SparseFiring

FEW: dict[str, Any] = {"n_features": 6, "d_in": 10, "probabilities": 0.3, "batch_size": 16}
MANY: dict[str, Any] = {
    "n_features": 300,
    "d_in": 10,
    "directions": "random",
    "probabilities": {"zipf": (0.3, 0.002)},
    "batch_size": 16,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder(LightningModule):
    """Keeps the batches it is given; its one weight learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches: list[Tensor] = []
        self.held_out: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch.clone())
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.held_out.append(batch.clone())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(max_steps: int = 10, *callbacks: Callback, **arguments: Any) -> Trainer:
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    settings = {
        **dict.fromkeys(silent, False),
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "accelerator": "cpu",
        "max_steps": max_steps,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        **arguments,
    }
    return Trainer(callbacks=list(callbacks), **settings)


def batches_of_a_fit(
    data: ToyDataModule, max_steps: int, ckpt_path: Path | None = None, **arguments: Any
) -> Tensor:
    recorder = Recorder()
    trainer(max_steps, **arguments).fit(recorder, data, ckpt_path=ckpt_path)
    return torch.stack(recorder.batches)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five batches of 16 rows of 10 numbers."""
    monkeypatch.setattr(toy_stream, "BLOCK_BYTES", 4 * 10 * 16 * 5)


# Samples.


@pytest.mark.parametrize(("world", "firing"), [(FEW, DenseFiring), (MANY, SparseFiring)])
def test_activations_are_the_sum_of_directions_by_magnitude(
    world: dict[str, Any], firing: type
) -> None:
    bias = torch.randn(10).tolist()
    data = ToyDataModule(**world, bias=bias, magnitude_spread=0.5)
    assert isinstance(data.firing, firing)
    x, code = sample = data.sample(50, generator())
    magnitudes = sample.magnitudes
    assert magnitudes.shape == (50, data.n_features)
    assert torch.equal(code.firings(), (magnitudes > 0).sum(0))
    assert 0 < (magnitudes > 0).float().mean() < 0.5
    for row, strengths in zip(x.double(), magnitudes.double(), strict=True):
        expected = torch.tensor(bias, dtype=torch.float64)
        for strength, direction in zip(strengths, data.features.double(), strict=True):
            expected = expected + strength * direction
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("world", [FEW, MANY])
def test_firings_without_spread_have_their_magnitude_exactly(world: dict[str, Any]) -> None:
    data = ToyDataModule(**world, magnitudes={"linear": (20.0, 1.0)})
    magnitudes = data.sample(400, generator()).magnitudes
    values = data.magnitudes.expand_as(magnitudes)
    assert torch.equal(magnitudes[magnitudes > 0], values[magnitudes > 0])
    torch.testing.assert_close(data.magnitudes, torch.linspace(20, 1, data.n_features))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("world", [FEW, MANY])
def test_magnitudes_spread_about_their_mean(world: dict[str, Any], relative: bool) -> None:
    data = ToyDataModule(
        **world, magnitudes=4.0, magnitude_spread=0.1, relative_spread=relative, seed=1
    )
    magnitudes = data.sample(3000, generator()).magnitudes
    values = magnitudes[magnitudes > 0].double()
    deviation = 0.4 if relative else 0.1
    assert abs(values.mean().item() - 4) < 5 * deviation / len(values) ** 0.5
    assert values.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("world", [FEW, MANY])
def test_a_magnitude_is_never_negative_and_one_of_zero_is_no_firing(world: dict[str, Any]) -> None:
    data = ToyDataModule(**{**world, "probabilities": 0.04}, magnitude_spread=3.0)
    magnitudes, code = (s := data.sample(5000, generator())).magnitudes, s.code
    assert (magnitudes >= 0).all()
    kept = 0.5 * (1 + torch.erf(torch.tensor(1 / 3 / 2**0.5)).item())  # N(1, 3) above 0
    rate = (magnitudes > 0).double().mean().item()
    assert rate == pytest.approx(0.04 * kept, rel=0.1)
    assert torch.equal(code.firings(), (magnitudes > 0).sum(0))


def test_noise_is_gaussian_on_each_coordinate() -> None:
    data = ToyDataModule(**FEW, noise=0.5)
    x, code = data.sample(20_000, generator())
    noise = x - code.to_dense() @ data.features
    torch.testing.assert_close(noise.T.cov(), 0.25 * torch.eye(10), atol=0.02, rtol=0)
    assert noise.mean(0).abs().max() < 0.02


def test_a_bias_may_be_given_by_its_norm() -> None:
    data = ToyDataModule(**FEW, bias=3.0)
    assert data.bias.norm().item() == pytest.approx(3.0)
    x, code = data.sample(30, generator())
    torch.testing.assert_close(x - code.to_dense() @ data.features, data.bias.expand(30, 10))
    assert not torch.equal(data.bias, ToyDataModule(**FEW, bias=3.0, seed=1).bias)


def test_rules_hold_in_the_samples_and_are_told() -> None:
    data = ToyDataModule(**FEW, parents={0: [1, 2]}, requires={3: 4})
    fires = data.sample(2000, generator()).magnitudes > 0
    assert data.pairs == [(0, 1), (0, 2), (4, 3)]
    assert fires[fires[:, 1] | fires[:, 2], 0].all()
    assert not fires[~fires[:, 4], 3].any()
    assert fires[:, 3].any()


def test_correlated_features_fire_together() -> None:
    settings: Any = {**FEW, "correlation": 0.8, "correlation_groups": [[0, 1]]}
    fires = (ToyDataModule(**settings).sample(5000, generator()).magnitudes > 0).double()
    together = fires.T @ fires / 5000
    assert together[0, 1] > 0.18
    assert together[2, 3] < 0.12


# The stream.


def test_batches_are_float32_and_of_the_size_asked_for() -> None:
    batches = batches_of_a_fit(ToyDataModule(**FEW), 3)
    assert batches.shape == (3, 16, 10)
    assert batches.dtype == torch.float32


def test_batches_are_samples_of_the_world() -> None:
    data = ToyDataModule(**FEW)
    rows = batches_of_a_fit(data, 100).flatten(0, 1)
    magnitudes = rows @ data.features.T
    assert ((magnitudes - magnitudes.round()).abs() < 1e-5).all()
    rate = magnitudes.mean(0)
    assert ((rate - 0.3).abs() < 5 * (0.3 * 0.7 / 1600) ** 0.5).all()


def test_the_seed_alone_decides_the_stream_and_the_directions() -> None:
    torch.manual_seed(1)
    one, batches = ToyDataModule(**FEW), batches_of_a_fit(ToyDataModule(**FEW), 12)
    torch.manual_seed(2)
    two, again = ToyDataModule(**FEW), batches_of_a_fit(ToyDataModule(**FEW), 12)
    assert torch.equal(one.features, two.features)
    assert torch.equal(batches, again)
    other = ToyDataModule(**FEW, seed=1)
    assert not torch.equal(one.features, other.features)
    assert not torch.equal(batches, batches_of_a_fit(other, 12))


def test_validation_does_not_advance_the_training_stream() -> None:
    alone = batches_of_a_fit(ToyDataModule(**FEW), 20)
    validated = batches_of_a_fit(
        ToyDataModule(**FEW, n_validation=40),
        20,
        limit_val_batches=1.0,
        val_check_interval=3,
        num_sanity_val_steps=2,
    )
    assert torch.equal(validated, alone)


def test_held_out_samples_are_the_same_each_time_and_others_than_training() -> None:
    data = ToyDataModule(**FEW, noise=0.1, n_validation=40, n_test=50)
    train = batches_of_a_fit(data, 8).flatten(0, 1)
    recorder = Recorder()
    trainer(limit_val_batches=1.0).validate(recorder, data, verbose=False)
    trainer(limit_val_batches=1.0).validate(recorder, data, verbose=False)
    validation = torch.cat(recorder.held_out)
    assert [len(batch) for batch in recorder.held_out] == [16, 16, 8] * 2
    assert torch.equal(validation[:40], validation[40:])
    recorder = Recorder()
    trainer().test(recorder, data, verbose=False)
    test = torch.cat(recorder.held_out)
    assert len(test) == 50
    everything = torch.cat([train, validation[:40], test])
    assert len(everything.unique(dim=0)) == len(everything)
    assert torch.equal(torch.cat(list(data.predict_dataloader())), test)


class OneOfTwo(Trainer):
    """As much of a rank's trainer as the data looks at."""

    global_rank, world_size, strategy = 0, 2, None  # type: ignore[assignment]

    def __init__(self, rank: int) -> None:
        self.global_rank, self.overfit_batches = rank, 0


def test_ranks_have_different_samples_and_equally_many_batches() -> None:
    def of_rank(rank: int) -> tuple[Tensor, Tensor]:
        data = ToyDataModule(**FEW, noise=0.1, n_validation=40)
        data.trainer = OneOfTwo(rank)
        stream, held_out = iter(data.train_dataloader()), data.val_dataloader()
        assert len(held_out) == 3
        return torch.cat([next(stream) for _ in range(12)]), torch.cat(list(held_out))

    rows = torch.cat([*of_rank(0), *of_rank(1)])
    assert len(rows) == 2 * (12 * 16 + 40)
    assert len(rows.unique(dim=0)) == len(rows)


# Going on.


@pytest.mark.parametrize("world", [FEW, MANY])
@pytest.mark.parametrize("n_before", [1, 5, 13])
def test_a_resumed_run_gets_the_batches_of_one_that_was_not_stopped(
    world: dict[str, Any], n_before: int, tmp_path: Path
) -> None:
    whole = batches_of_a_fit(ToyDataModule(**world), 24)
    path = tmp_path / "run.ckpt"
    run = trainer(n_before)
    run.fit(Recorder(), ToyDataModule(**world))
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["ToyDataModule"]
    assert state == {"served": n_before, "batch_size": 16}
    rest = batches_of_a_fit(ToyDataModule(**world), 24, ckpt_path=path)
    assert torch.equal(rest, whole[n_before:])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_checkpoint_of_the_middle_of_a_run_gives_the_rest_of_it(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    recorder = Recorder()
    trainer(20, saving, limit_val_batches=1.0, val_check_interval=5).fit(
        recorder, ToyDataModule(**FEW, n_validation=20)
    )
    for step in (7, 14):
        path = tmp_path / f"step={step}.ckpt"
        rest = batches_of_a_fit(ToyDataModule(**FEW), 20, ckpt_path=path)
        assert torch.equal(rest, torch.stack(recorder.batches[step:]))


def test_a_second_run_with_the_same_data_starts_at_the_beginning(tmp_path: Path) -> None:
    data, run = ToyDataModule(**FEW), trainer(12)
    run.fit(Recorder(), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    first = batches_of_a_fit(data, 12)
    assert torch.equal(batches_of_a_fit(data, 12), first)
    batches_of_a_fit(data, 15, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(batches_of_a_fit(data, 12), first)


def test_an_sae_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    def sae() -> ReLUSAE:
        torch.manual_seed(0)
        return ReLUSAE(10, 12, l1_coefficient=0.1, lr=1e-2, decoder_norm="free")

    whole, stopped, resumed = sae(), sae(), sae()
    quiet: Any = {"limit_val_batches": 0}
    trainer(20, **quiet).fit(whole, ToyDataModule(**FEW))
    run = trainer(8, **quiet)
    run.fit(stopped, ToyDataModule(**FEW))
    run.save_checkpoint(tmp_path / "run.ckpt")
    trainer(20, **quiet).fit(resumed, ToyDataModule(**FEW), ckpt_path=tmp_path / "run.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    assert not torch.equal(stopped.W_dec, whole.W_dec)


# What an SAE takes from the data.


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_centring_and_scaling_are_what_the_sae_sees(center: bool, scale: bool) -> None:
    data = ToyDataModule(**FEW, bias=5.0, center=center, scale=scale)
    assert (data.scaling() is None) == (not center and not scale)
    sae = ReLUSAE(10, 12, decoder_norm="free")
    trainer(1).fit(sae, data)
    seen = sae.scaled(data.sample(20_000, generator()).x)
    assert (seen.mean(0).norm() < 0.1) == center
    assert (abs(seen.norm(dim=1).mean() - 10**0.5) < 0.05) == scale


def test_the_source_is_plain_and_stays_with_the_sae(tmp_path: Path) -> None:
    world: Any = {**MANY, "parents": {3: [1, 2]}, "bias": 0.5, "seed": 7}
    data = ToyDataModule(**world)
    assert data.source == json.loads(json.dumps(data.source))
    assert data.source["probabilities"] == {"zipf": [0.3, 0.002]}
    assert data.source["parents"] == {"3": [1, 2]}
    assert data.source["seed"] == 7
    sae = ReLUSAE(10, 12, decoder_norm="free")
    trainer(1).fit(sae, data)
    assert load(sae.save_pretrained(tmp_path / "sae")).source == data.source
    given = ToyDataModule(2, 2, directions=torch.eye(2))
    assert given.source["directions"] == "given"
    torch.testing.assert_close(given.features, torch.eye(2))


def test_resuming_on_another_world_is_refused(tmp_path: Path) -> None:
    run, sae = trainer(2), ReLUSAE(10, 12, decoder_norm="free")
    run.fit(sae, ToyDataModule(**FEW))
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="`data.magnitude_spread` to be 0.0 but got 0.5"):
        trainer(3).fit(
            ReLUSAE(10, 12, decoder_norm="free"),
            ToyDataModule(**FEW, magnitude_spread=0.5),
            ckpt_path=tmp_path / "run.ckpt",
        )


def test_an_sae_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="`d_in` to be 10, the width of the data's activations"):
        trainer(1).fit(ReLUSAE(8, 12, decoder_norm="free"), ToyDataModule(**FEW))


YAML = """
trainer: {accelerator: cpu, logger: false, max_steps: 2}
model:
  class_path: lightning_sae.ReLUSAE
  init_args: {d_sae: 12}
data:
  class_path: lightning_sae.ToyDataModule
  init_args:
    n_features: 8
    d_in: 10
    directions: nearly_orthogonal
    probabilities: {linear: [0.1, 0.3]}
    magnitudes: [8, 7, 6, 5, 4, 3, 2, 1]
    parents: {5: [6, 7]}
    requires: {1: 0, 2: 0}
    correlation: 0.5
    correlation_groups: [[3, 4]]
    bias: 0.5
"""


def test_a_world_may_be_written_as_yaml(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(YAML)
    data: Any = main(["--config", str(tmp_path / "toy.yaml")], run=False).datamodule
    expected = ToyDataModule(
        8,
        10,
        directions="nearly_orthogonal",
        probabilities={"linear": (0.1, 0.3)},
        magnitudes=[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        parents={5: [6, 7]},
        requires={1: 0, 2: 0},
        correlation=0.5,
        correlation_groups=[[3, 4]],
        bias=0.5,
    )
    assert data.source == expected.source
    assert data.pairs == expected.pairs
    assert torch.equal(data.sample(64, generator()).x, expected.sample(64, generator()).x)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_features": 0}, "`n_features` to be positive but got 0"),
        ({"batch_size": -1}, "`batch_size` to be positive but got -1"),
        ({"n_test": 0}, "`n_test` to be positive but got 0"),
        ({"probabilities": 1.5}, "`probabilities` to be from 0 to 1 but got 1.5"),
        ({"probabilities": [0.1] * 7}, "`probabilities` to have 6 numbers"),
        ({"magnitudes": -1.0}, "`magnitudes` to be from 0 to inf but got -1"),
        ({"magnitudes": float("inf")}, "`magnitudes` .* but got inf"),
        ({"noise": -0.5}, "`noise` to be from 0 to inf but got -0.5"),
        ({"magnitude_spread": float("nan")}, "`magnitude_spread` .* but got nan"),
        ({"n_features": 11}, "`n_features` to be at most d_in=10 for orthogonal"),
        ({"parents": {0: [6]}}, r"`parents` to name features from 0 to 5"),
        ({"correlation": 1.0}, "`correlation` to be at least 0 and below 1"),
        ({"bias": [1.0]}, "`bias` to be a norm or d_in=10 numbers but got 1"),
    ],
)
def test_a_world_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyDataModule(**{**FEW, **arguments})


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no end: set `trainer.max_steps` .* 16 activations"):
        trainer(-1, max_epochs=3).fit(Recorder(), ToyDataModule(**FEW))


def test_a_run_may_end_by_the_length_of_its_epochs() -> None:
    limited = trainer(-1, max_epochs=2, limit_train_batches=3)
    limited.fit(Recorder(), ToyDataModule(**FEW))
    assert limited.global_step == 6


def test_validation_that_would_never_come_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="set `trainer.val_check_interval` to a number of batches"):
        trainer(2, limit_val_batches=1.0).fit(Recorder(), ToyDataModule(**FEW))
