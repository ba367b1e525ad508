from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import BatchTopKSAE, MatryoshkaSAE, ReLUSAE, TiedSAE, load
from lightning_sae.architectures.orthogonality import WithOrthogonality
from lightning_sae.callbacks import DecoderNormProjection

D_IN, D_SAE, ROWS, BATCHES = 5, 12, 20, 9


def batches() -> DataLoader:
    x = torch.randn(BATCHES, ROWS, D_IN, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


def build_trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=[DecoderNormProjection(), *callbacks], **flags)


def build(kind: Any = TiedSAE, **kwargs: Any) -> WithOrthogonality:
    torch.manual_seed(1)
    return kind(
        D_IN,
        D_SAE,
        **{"orthogonality_coefficient": 3.0, "orthogonality_window": 4, "lr": 0.01, **kwargs},
    )


class Heights(Callback):
    """The largest activation of each latent in each batch, by the weights it was trained with."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.seen.append(pl_module.encode(batch).amax(0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_peaks_are_those_of_the_last_micro_batches(
    chunk_rows: int | None, accumulate: int, precision: Any
) -> None:
    # `b_dec` is placed in the first batch after the callback looked, so it starts at zero.
    sae, heights = build(chunk_rows=chunk_rows, b_dec_init="zero"), Heights()
    trainer = build_trainer(heights, accumulate_grad_batches=accumulate, precision=precision)
    trainer.fit(sae, batches())
    assert sae.peaks is not None
    expected = torch.stack(heights.seen[-4:]).amax(0)
    rtol, atol = (1e-5, 1e-6) if precision == "32-true" else (0.02, 0.02)
    torch.testing.assert_close(sae.peaks.peaks(), expected, rtol=rtol, atol=atol)
    assert trainer.callback_metrics["train/orthogonality"] > 0


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied": (TiedSAE, {}),
    "tied with thresholds": (TiedSAE, {"threshold_init": 0.1}),
    "mixture": (ReLUSAE, {"orthogonality_threshold": "mixture"}),
    "high": (ReLUSAE, {"orthogonality_side": "high"}),
    "batch top k": (BatchTopKSAE, {"k": 3}),
    "matryoshka": (MatryoshkaSAE, {"k": 3, "prefixes": [4, D_SAE]}),
    "matryoshka with a ReLU": (MatryoshkaSAE, {"k": None, "prefixes": 2}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_is_exact(name: str, tmp_path: Path) -> None:
    kind, arguments = KINDS[name]
    straight, stopped, resumed = (build(kind, **arguments) for _ in range(3))
    build_trainer(max_epochs=2).fit(straight, batches())
    first = build_trainer()
    first.fit(stopped, batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    second = build_trainer(max_epochs=2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert second.global_step == 2 * BATCHES
    assert straight.peaks is not None
    assert straight.peaks.n_batches == 2 * BATCHES
    for entry, expected in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[entry], expected), entry


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_trained_by_the_loss(name: str) -> None:
    """It is a pure number times its weight, and it moves the encoder."""
    kind, arguments = KINDS[name]
    sae = build(kind, **arguments)
    assert sae.peaks is not None
    x = batches().dataset[0]
    sae.peaks.recent[0] = sae.encode(x).amax(0)
    loss = sae.objective(x).losses["orthogonality"]
    f, cosines = (
        sae.objective(x).f.to_dense(),
        torch.nn.functional.cosine_similarity(  # type: ignore[union-attr]
            sae.encoder_input(x).unsqueeze(1), sae.W_enc.T.unsqueeze(0), dim=-1
        ),
    )
    strong = f > sae.peaks.thresholds()
    assert strong.any()
    side = strong if sae.orthogonality_side == "high" else ~strong
    torch.testing.assert_close(loss, 3.0 * (cosines.square() * side).mean())
    (gradient,) = torch.autograd.grad(loss, sae.W_dec if sae.tied else sae.W_enc)
    assert gradient.abs().sum() > 0


def test_a_mixture_logs_how_many_latents_have_two_peaks() -> None:
    trainer = build_trainer()
    trainer.fit(build(orthogonality_threshold="mixture"), batches())
    assert {"train/two_peaks", "train/separation"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("threshold", ["share", "mixture"])
def test_an_exported_sae_keeps_its_arguments_and_its_thresholds(
    threshold: str, tmp_path: Path
) -> None:
    sae = build(threshold_init=0.2, orthogonality_threshold=threshold, orthogonality_side="high")
    build_trainer().fit(sae, batches())
    sae.input_scale.fill_(2.0)
    loaded = load(sae.save_pretrained(tmp_path / "sae"))
    x = torch.randn(50, D_IN)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    assert isinstance(loaded, TiedSAE)
    assert (loaded.orthogonality_coefficient, loaded.orthogonality_side) == (3.0, "high")
    assert type(loaded.peaks) is type(sae.peaks)


class Mixed:
    """Two features that fire together half of the time that the first fires; else the second."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> "Mixed":
        return self

    def __next__(self) -> Tensor:
        first, second = (torch.rand(2, 256, 1, generator=self.generator) < 0.3).float()
        return 3 * first * torch.eye(4)[0] + 2 * torch.maximum(first, second) * torch.eye(4)[1]


def cosine_with_the_first(orthogonality_coefficient: float, threshold: Any) -> float:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "orthogonality_coefficient": orthogonality_coefficient,
        "orthogonality_threshold": threshold,
    }
    sae = TiedSAE(4, 1, 0.01, lr=0.03, b_dec_init="zero", lr_decay_steps=80, **arguments)
    sae.W_dec.data.abs_()
    build_trainer(max_epochs=-1, max_steps=200).fit(sae, Mixed())  # type: ignore[arg-type]
    return (sae.W_dec[0, 0] / sae.W_dec[0].norm()).item()


@pytest.mark.usefixtures("unchecked")  # many steps, whose annotations other tests execute
def test_a_latent_lets_go_of_the_feature_on_which_it_fires_weakly() -> None:
    assert cosine_with_the_first(0.0, "share") < 0.9
    assert cosine_with_the_first(300.0, "share") > 0.99
    assert cosine_with_the_first(300.0, "mixture") > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"orthogonality_coefficient": -1.0},
            "`orthogonality_coefficient` to be at least 0 but got -1",
        ),
        ({"orthogonality_window": 0}, "`orthogonality_window` to be positive but got 0"),
        (
            {"orthogonality_threshold_share": 0.0},
            "`orthogonality_threshold_share` to be positive but got 0",
        ),
        (
            {"orthogonality_threshold_share": 1.5},
            "`orthogonality_threshold_share` to be at most 1 but got 1.5",
        ),
        ({"orthogonality_side": "left"}, "`orthogonality_side` to be one of .* but got 'left'"),
        (
            {"orthogonality_threshold": "peak"},
            "`orthogonality_threshold` to be one of .* but got 'peak'",
        ),
        ({"threshold_init": -0.1}, "`threshold_init` to be at least 0 but got -0.1"),
        ({"bandwidth": 0.0}, "`bandwidth` to be positive but got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)
