import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_sae import GatedSAE, JumpReLUSAE, ReLUSAE, TiedSAE, TopKSAE
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup, TargetL0

D_IN, D_SAE, ROWS, BATCHES = 6, 24, 32, 12


def build_sae(kind=ReLUSAE, **kwargs):
    torch.manual_seed(1)
    return kind(D_IN, D_SAE, 0.2, lr=0.01, **kwargs)


def build_trainer(*callbacks: Callback, **kwargs) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **flags)


def batches() -> DataLoader:
    x = torch.randn(BATCHES, ROWS, D_IN, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


class Watch(Callback):
    """Firings of each batch, and the factor that it was trained with."""

    def __init__(self):
        self.fired, self.factors = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.factors.append(pl_module.penalty_factor)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.fired.append(outputs["fired"].sum().item())


def by_hand(fired: list[float], target: float, per_step: int, **settings: float) -> list[float]:
    """The factor of each micro-batch, from the formula; `total` if the run's length is known."""
    change, n, longest, total = (settings[name] for name in ("change", "n", "h", "total"))
    factor, mean, factors = 1.0, None, []
    for i in range(0, len(fired), per_step):
        factors += [factor] * per_step
        y = math.log(sum(fired[i : i + per_step]) / (per_step * ROWS) / target)
        last = y if mean is None else mean
        mean = last + (y - last) / (min(n, max(5, total / 50)) if total else n)
        left = (0.8 * total - (i // per_step + 1)) / 2
        h = min(longest, max(left, min(total / 25, 100), 20)) if total else longest
        below = 15 * min(0.05, max(0.0, -mean)) if total else 0.0
        factor *= (1 + change) ** max(-5, min(1, 3 * (mean + h * (mean - last)) - below))
    return factors


@pytest.mark.parametrize("target", [1.0, 6.0, 20.0])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_factor_follows_the_formula_step_by_step(precision, accumulate, target):
    watch, sae = Watch(), build_sae()
    callback = TargetL0(target, max_change=0.03, smoothing_steps=4, foresight_steps=2)
    trainer = build_trainer(
        callback, watch, precision=precision, accumulate_grad_batches=accumulate
    )
    trainer.fit(sae, batches())
    expected = by_hand(watch.fired, target, accumulate, change=0.03, n=4, h=2, total=0)
    assert watch.factors == pytest.approx(expected, rel=1e-12)
    changes = [b / a for a, b in zip(watch.factors, watch.factors[1:], strict=False)]
    assert all(1.03**-5 - 1e-12 < change < 1.03 + 1e-12 for change in changes)
    assert len(set(watch.factors)) > 1
    assert trainer.callback_metrics["train/penalty_factor"] == pytest.approx(sae.penalty_factor)


@pytest.mark.usefixtures("unchecked")
def test_in_a_run_of_known_length_it_looks_less_far_ahead_towards_the_end():
    watch, total = Watch(), 90
    callback = TargetL0(10.0, max_change=0.02, smoothing_steps=7, foresight_steps=30)
    trainer = build_trainer(callback, watch, max_epochs=-1, max_steps=total)
    trainer.fit(build_sae(), batches())
    settings = {"change": 0.02, "n": 7, "h": 30}
    expected = by_hand(watch.fired, 10.0, 1, total=total, **settings)
    assert watch.factors == pytest.approx(expected, rel=1e-12)
    assert expected != by_hand(watch.fired, 10.0, 1, total=0, **settings)


@pytest.mark.parametrize(("kind", "coefficient"), [(ReLUSAE, 0.3), (JumpReLUSAE, 0.1)])
@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_l0_reaches_the_target_for_any_coefficient(kind, coefficient):
    class Last(Callback):
        l0 = 0.0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.l0 += (outputs["fired"].sum().item() / len(batch) - self.l0) / 15

    torch.manual_seed(1)
    sae, last = kind(D_IN, D_SAE, coefficient, lr=0.02), Last()
    steering = TargetL0(4.0, smoothing_steps=5, foresight_steps=25)
    build_trainer(steering, DecoderNormProjection(), last, max_epochs=25).fit(sae, batches())
    assert last.l0 == pytest.approx(4.0, rel=0.1)


def test_it_waits_for_the_warm_up_unless_told_not_to():
    for during_warmup in (False, True):
        watch = Watch()
        callbacks = [L1Warmup(6), TargetL0(2.0, during_warmup=during_warmup), watch]
        build_trainer(*callbacks).fit(build_sae(), batches())
        # The share is 1 from the sixth step on: after that one it steers.
        still = [factor == 1.0 for factor in watch.factors]
        assert still == [n < (1 if during_warmup else 6) for n in range(BATCHES)]


def test_the_mean_is_kept_while_it_waits():
    watch = Watch()
    build_trainer(L1Warmup(6), TargetL0(2.0), watch).fit(build_sae(), batches())
    mean = before = math.log(watch.fired[0] / ROWS / 2.0)
    for fired in watch.fired[1:6]:
        before, mean = mean, mean + (math.log(fired / ROWS / 2.0) - mean) / 20
    expected = math.exp(TargetL0(2.0).step_of(mean, before, 200))
    assert watch.factors[6] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_exact(accumulate, tmp_path):
    saes, watches = [build_sae() for _ in range(3)], [Watch() for _ in range(3)]

    def fit(i, epochs, **kwargs):
        callbacks = [L1Warmup(3), TargetL0(2.0), watches[i]]
        trainer = build_trainer(*callbacks, max_epochs=epochs, accumulate_grad_batches=accumulate)
        trainer.fit(saes[i], batches(), **kwargs)
        return trainer

    fit(0, 2)
    fit(1, 1).save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    fit(2, 2, ckpt_path=tmp_path / "last.ckpt")
    assert watches[1].factors + watches[2].factors == watches[0].factors
    assert saes[2].penalty_factor == saes[0].penalty_factor != 1
    for name, expected in saes[0].named_parameters():
        assert torch.equal(saes[2].get_parameter(name), expected), name


def test_another_fit_starts_from_the_factor_that_was_reached_and_without_a_mean():
    callback, watch, sae = TargetL0(2.0), Watch(), build_sae()
    build_trainer(callback).fit(sae, batches())
    reached = sae.penalty_factor
    assert reached > 1
    build_trainer(callback, watch).fit(sae, batches())
    assert watch.factors[0] == reached
    first = math.log(watch.fired[0] / ROWS / 2.0)
    change = math.exp(callback.step_of(first, first, 200))
    assert watch.factors[1] == pytest.approx(reached * change, rel=1e-12)

    afresh = build_sae()
    watch = Watch()
    build_trainer(callback, watch).fit(afresh, batches())
    assert watch.factors[0] == 1.0


def test_l0_is_that_of_all_ranks(monkeypatch):
    """As if another rank had nothing but silent latents: L0 is half of this one's."""
    watch, trainer = Watch(), build_trainer(TargetL0(2.0, smoothing_steps=1), max_steps=2)
    reduce = trainer.strategy.reduce
    other = torch.tensor([0, ROWS])

    def summed(tensor, *args, **kwargs):
        if tensor.shape == (2,):
            assert kwargs == {"reduce_op": "sum"}
            return tensor + other
        return reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(trainer.strategy, "reduce", summed)
    trainer.callbacks.append(watch)
    trainer.fit(build_sae(), batches())
    halved = math.log(watch.fired[0] / (2 * ROWS) / 2.0)
    assert watch.factors[1] == pytest.approx(1.01 ** max(-5, min(1, 3 * halved)))


def test_latents_that_are_all_silent_let_the_penalty_fall():
    sae, watch = build_sae(b_dec_init="zero"), Watch()
    sae.b_enc.data.fill_(-100.0)
    build_trainer(TargetL0(2.0), watch).fit(sae, batches())
    assert watch.factors == pytest.approx([1.01 ** (-5 * n) for n in range(BATCHES)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, "`target` to be positive but got 0"),
        ({"max_change": 0.5}, "`max_change` to be above 0 and at most 0.1 but got 0.5"),
        ({"max_change": 0.0}, "`max_change` to be above 0 and at most 0.1 but got 0"),
        ({"smoothing_steps": 0}, "`smoothing_steps` to be positive but got 0"),
        ({"foresight_steps": -1}, "`foresight_steps` to be at least 0 but got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TargetL0(**{"target": 3.0, **arguments})


@pytest.mark.parametrize("sae", [TopKSAE(D_IN, D_SAE, k=3), ReLUSAE(D_IN, D_SAE, 0.0)])
def test_an_sae_without_a_penalty_is_refused(sae):
    with pytest.raises(ValueError, match="whose coefficient is not 0 but .* has none: remove the"):
        build_trainer(TargetL0(3.0)).fit(sae, batches())


def test_a_target_that_has_no_room_is_refused():
    with pytest.raises(ValueError, match="`target` to be less than `d_sae`=24 but got 24"):
        build_trainer(TargetL0(24.0)).fit(build_sae(), batches())


def test_two_of_them_are_refused():
    class Mine(TargetL0):
        pass

    with pytest.raises(ValueError, match="Expected one `TargetL0`.*remove all but one"):
        build_trainer(TargetL0(3.0), Mine(4.0)).fit(build_sae(), batches())


def brought(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, TargetL0)]


def test_an_sae_with_a_target_brings_it_along_and_trains_as_if_it_were_given():
    watches = [Watch(), Watch()]
    own, given = build_sae(target_l0=2.0), build_sae()
    trainer = build_trainer(watches[0])
    trainer.fit(own, batches())
    build_trainer(TargetL0(2.0), watches[1]).fit(given, batches())
    assert watches[0].factors == watches[1].factors
    assert len(set(watches[0].factors)) > 1
    assert own.hparams["target_l0"] == 2.0
    # Fitted again, it still has one; a tied SAE and a gated one bring it, too.
    trainer.fit_loop.max_epochs = 2
    trainer.fit(own, batches())
    assert [callback.target for callback in brought(trainer)] == [2.0]
    for kind in (TiedSAE, GatedSAE):
        trainer = build_trainer(max_steps=1, max_epochs=-1)
        trainer.fit(build_sae(kind, target_l0=3.0), batches())
        assert [callback.target for callback in brought(trainer)] == [3.0]


def test_two_targets_are_refused():
    with pytest.raises(ValueError, match="the SAE has `target_l0`=2 and the trainer a `TargetL0`"):
        build_trainer(TargetL0(3.0)).fit(build_sae(target_l0=2.0), batches())


MISSED = "`TargetL0` did not reach its target"


@pytest.mark.parametrize("target", [2.0, 20.0])
def test_a_missed_target_is_reported_with_figures(target):
    watch, callback, sae = Watch(), TargetL0(target, smoothing_steps=1), build_sae()
    with pytest.warns(UserWarning, match=MISSED) as warned:
        build_trainer(callback, watch).fit(sae, batches())
    (said,) = (str(each.message) for each in warned if MISSED in str(each.message))
    assert f"L0 is {watch.fired[-1] / ROWS:.3g} and not {target:g}" in said
    assert f"multiplied by {sae.penalty_factor:.3g}" in said


@pytest.mark.parametrize(("share", "missed"), [(0.93, True), (0.97, False), (1.03, False)])
def test_what_is_within_a_twentieth_is_reached(share, missed, recwarn):
    """Of an L0 that does not move."""
    sae = build_sae(b_dec_init="zero")
    sae.lr = 1e-30
    x = batches().dataset[:1].expand(BATCHES, -1, -1)
    l0 = (sae.encode(x[0]) > 0).sum(-1).double().mean().item()
    warnings.simplefilter("always")
    build_trainer(TargetL0(l0 * share)).fit(sae, DataLoader(x, batch_size=None))
    assert any(MISSED in str(each.message) for each in recwarn) == missed


@pytest.mark.parametrize(("held_out", "said"), [(1.0, False), (0.0, True)])
def test_a_different_held_out_l0_is_reported(held_out, said, recwarn):
    """Held-out activations are zeros, on which no latent fires."""
    sae = build_sae(b_dec_init="zero")
    sae.lr = 1e-30
    x = batches().dataset[:1].expand(BATCHES, -1, -1)
    l0 = (sae.encode(x[0]) > 0).sum(-1).double().mean().item()
    loaders = [DataLoader(rows, batch_size=None) for rows in (x, x[:1] * held_out)]
    trainer = build_trainer(TargetL0(l0), num_sanity_val_steps=0)
    warnings.simplefilter("always")
    trainer.fit(sae, *loaders)
    found = [str(each.message) for each in recwarn if "on held-out activations L0 is" in str(each)]
    assert len(found) == said
