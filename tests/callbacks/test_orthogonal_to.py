import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE, TiedSAE
from lightning_sae.callbacks import DeadFeatureResampling, DecoderNormProjection, OrthogonalTo
from lightning_sae.callbacks.orthogonal_to import span

# Some of these runs let the norms drift, to see what this callback does alone.

D_IN, D_SAE, LR = 7, 7, 0.02  # as many latents as dimensions: an axis mistaken would not show up


def directions() -> torch.Tensor:
    """Two that are neither of unit norm nor orthogonal."""
    return torch.randn(2, D_IN, generator=torch.Generator().manual_seed(5)) * 3


def build_sae(kind=ReLUSAE, **kwargs) -> ReLUSAE:
    torch.manual_seed(1)
    return kind(D_IN, D_SAE, 0.1, lr=LR, b_dec_init="zero", **kwargs)


def build_trainer(*callbacks: Callback, **kwargs) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **flags)


def batches() -> DataLoader:
    x = torch.randn(12, 16, D_IN, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


def encoder_part(sae) -> float:
    """The largest cosine of an encoder direction with one that it should be orthogonal to."""
    return cosines(sae.W_enc.T).max().item()


def decoder_part(sae) -> float:
    return cosines(sae.W_dec).max().item()


def cosines(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(
        rows.detach().double().unsqueeze(1), directions().double().unsqueeze(0), dim=-1
    ).abs()


class Watch(Callback):
    """What is left in the directions after each batch, and before the first."""

    def __init__(self):
        self.encoder, self.decoder, self.norms = [], [], []

    def look(self, sae):
        self.encoder.append(encoder_part(sae))
        self.decoder.append(decoder_part(sae))
        self.norms.append((sae.W_dec.norm(dim=-1) - 1).abs().max().item())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.look(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(pl_module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [ReLUSAE, TiedSAE])
def test_rows_stay_orthogonal_through_training_and_of_unit_norm(kind, accumulate, precision):
    sae, watch = build_sae(kind), Watch()
    assert min(encoder_part(sae), decoder_part(sae)) > 0.1
    before = sae.W_dec.detach().clone()
    callbacks = [OrthogonalTo(directions()), DecoderNormProjection(), watch]
    trainer = build_trainer(*callbacks, precision=precision, accumulate_grad_batches=accumulate)
    trainer.fit(sae, batches())
    assert max(watch.encoder + watch.decoder) < 1e-6
    assert max(watch.norms) < 1e-6
    assert (sae.W_dec - before).abs().max() > LR  # it did learn


@pytest.mark.parametrize(("encoder", "decoder"), [(True, False), (False, True)])
def test_one_of_the_two_is_left_alone(encoder, decoder):
    sae = build_sae()
    build_trainer(OrthogonalTo(directions(), encoder, decoder)).fit(sae, batches())
    assert (encoder_part(sae) < 1e-6) == encoder
    assert (decoder_part(sae) < 1e-6) == decoder


@pytest.mark.parametrize(("encoder", "decoder"), [(True, False), (False, True)])
def test_a_tied_latent_has_one_direction_for_both(encoder, decoder):
    sae = build_sae(TiedSAE)
    build_trainer(OrthogonalTo(directions(), encoder, decoder)).fit(sae, batches())
    assert decoder_part(sae) < 1e-6


class WeightsAlone(OrthogonalTo):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_projection_then_clipping_then_adam_then_projection(clip, accumulate):
    sae = build_sae(clip_grad_norm=clip, decoder_norm="free")
    by_hand = build_sae(decoder_norm="free")
    trainer = build_trainer(OrthogonalTo(directions()), accumulate_grad_batches=accumulate)
    trainer.fit(sae, batches())

    away = torch.eye(D_IN) - torch.linalg.pinv(directions()) @ directions()
    optimizer = Adam(by_hand.parameters(), lr=LR)
    with torch.no_grad():
        by_hand.W_enc.copy_(away @ by_hand.W_enc)
        by_hand.W_dec.copy_(by_hand.W_dec @ away)
    for step in range(0, 12, accumulate):
        optimizer.zero_grad()
        for batch in batches().dataset[step : step + accumulate]:
            (sum(by_hand.objective(batch).losses.values()) / accumulate).backward()
        by_hand.W_enc.grad = away @ by_hand.W_enc.grad
        by_hand.W_dec.grad = by_hand.W_dec.grad @ away
        if clip:
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            by_hand.W_enc.copy_(away @ by_hand.W_enc)
            by_hand.W_dec.copy_(by_hand.W_dec @ away)
    for name, expected in by_hand.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name), expected, atol=1e-5, rtol=0)

    without = build_sae(clip_grad_norm=clip, decoder_norm="free")
    trainer = build_trainer(WeightsAlone(directions()), accumulate_grad_batches=accumulate)
    trainer.fit(without, batches())
    assert (without.W_enc - sae.W_enc).abs().max() > 1e-3  # the gradient's projection does matter


def test_a_resumed_run_is_exact(tmp_path):
    straight, stopped, resumed = build_sae(), build_sae(), build_sae()

    def trainer(epochs):
        return build_trainer(OrthogonalTo(directions()), DecoderNormProjection(), max_epochs=epochs)

    trainer(2).fit(straight, batches())
    first = trainer(1)
    first.fit(stopped, batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert second.global_step == 24
    for name, expected in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), expected), name


def test_new_directions_of_dead_latents_are_projected_with_the_next_step():
    sae, watch = build_sae(), Watch()
    sae.b_enc.data[:3] = -100.0
    resampling = DeadFeatureResampling(every_n_steps=4, max_resamplings=1)
    build_trainer(OrthogonalTo(directions()), DecoderNormProjection(), resampling, watch).fit(
        sae, batches()
    )
    assert watch.decoder[4] > 0.1
    assert max(watch.decoder[:4] + watch.decoder[5:]) < 1e-6


def test_a_step_that_the_gradient_scaler_skips_is_not_followed_by_a_projection():
    class Counting(OrthogonalTo):
        n_after = 0

        def project(self, rows):
            super().project(rows)
            self.n_after += rows.data_ptr() == self.decoder_memory

        def on_train_start(self, trainer, pl_module):
            self.decoder_memory = pl_module.W_dec.data_ptr()
            super().on_train_start(trainer, pl_module)
            self.n_after = 0

    # After three steps the scale is such that gradients overflow; after a skip it is 1 again.
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=1.0, growth_factor=2.0**127, backoff_factor=2.0**-127, growth_interval=3
    )
    precision, callback = MixedPrecision("16-mixed", "cpu", scaler), Counting(directions())
    build_trainer(callback, plugins=[precision]).fit(build_sae(), batches())
    assert callback.n_after == 9


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed_from_the_optimizer(fails):
    optimizers = []

    class Failing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            optimizers.append(trainer.optimizers[0])
            assert trainer.optimizers[0]._optimizer_step_post_hooks
            if fails and batch_idx == 3:
                raise RuntimeError("no more")

    trainer = build_trainer(OrthogonalTo(directions()), Failing())
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            trainer.fit(build_sae(), batches())
    else:
        trainer.fit(build_sae(), batches())
    assert not optimizers[0]._optimizer_step_post_hooks


def test_a_basis_is_orthonormal_and_has_what_it_is_made_of():
    given = torch.randn(4, 9)
    given[3] = given[0] - 2 * given[1]  # adds nothing
    basis = span(given)
    assert basis.shape == (3, 9)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3))
    torch.testing.assert_close(given @ basis.T @ basis, given, atol=1e-5, rtol=0)
    torch.testing.assert_close(span(2 * given[0]).abs(), (given[:1] / given[0].norm()).abs())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("as_path", [True, False])
def test_directions_are_read_from_a_file(suffix, as_path, tmp_path):
    path = tmp_path / f"directions{suffix}"
    if suffix == ".pt":
        torch.save(directions(), path)
    else:
        save_file({"rows": directions()}, path)
    callback = OrthogonalTo(path if as_path else str(path))
    assert torch.equal(callback.basis, OrthogonalTo(directions()).basis)


def test_a_file_without_one_tensor_is_refused(tmp_path):
    path = tmp_path / "directions.safetensors"
    with pytest.raises(ValueError, match=r"could not read .*directions.safetensors"):
        OrthogonalTo(path)
    save_file({"a": directions(), "b": directions()}, path)
    with pytest.raises(ValueError, match="file with one tensor but .* holds 2 things: save"):
        OrthogonalTo(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"could not read"):
        OrthogonalTo(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("it was run",))

    torch.save({"directions": Evil()}, tmp_path / "directions.pt")
    with pytest.raises(ValueError, match=r"could not read .*directions.pt"):
        OrthogonalTo(tmp_path / "directions.pt")


@pytest.mark.parametrize(
    "given",
    [torch.zeros(2, 7), torch.full((2, 7), torch.nan), torch.ones(2, 2, 7), torch.zeros(0, 7)],
)
def test_directions_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match=r"`directions` to be rows \[n, d_in\]"):
        OrthogonalTo(given)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([OrthogonalTo(torch.ones(8))], "`directions` to be 7 wide, as `d_in` but got 8"),
        ([OrthogonalTo(torch.eye(7))], "of a rank below `d_in`=7, which leaves nothing but got 7"),
        ([OrthogonalTo(torch.ones(7)), OrthogonalTo(torch.ones(7))], "Expected one `OrthogonalTo`"),
        (
            [DecoderNormProjection(), OrthogonalTo(torch.ones(7))],
            "`OrthogonalTo` before `DecoderNormProjection`.* change their order",
        ),
    ],
)
def test_what_cannot_hold_is_refused_before_training(callbacks, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(*callbacks).fit(build_sae(), batches())


def test_an_encoder_alone_may_come_after_the_decoders_norm():
    sae = build_sae()
    callbacks = [DecoderNormProjection(), OrthogonalTo(directions(), decoder=False)]
    build_trainer(*callbacks).fit(sae, batches())
    assert encoder_part(sae) < 1e-6


def test_neither_encoder_nor_decoder_is_refused():
    with pytest.raises(ValueError, match="one of `encoder` and `decoder` to be true"):
        OrthogonalTo(directions(), encoder=False, decoder=False)


def test_a_module_that_is_no_sae_is_refused():
    class Line(LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(7))

        def training_step(self, batch, batch_idx):
            return (batch @ self.w).sum()

        def configure_optimizers(self):
            return Adam(self.parameters())

    with pytest.raises(ValueError, match="needs an SAE, which Line is not: train one or remove"):
        build_trainer(OrthogonalTo(directions())).fit(Line(), batches())


def test_the_directions_given_are_not_changed():
    given = directions()
    before = copy.deepcopy(given)
    build_trainer(OrthogonalTo(given)).fit(build_sae(), batches())
    assert torch.equal(given, before)
