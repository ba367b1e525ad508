from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_sae import JumpReLUSAE, ReLUSAE, TiedSAE
from lightning_sae.functional.sparse.code import Layout
from lightning_sae.training.optimizer import MemoryOrderAdam, clip_norm, in_memory_order


def transposed(tensor: Tensor) -> Tensor:
    """The same matrix, column by column in memory."""
    return tensor.T.contiguous().T


def weights() -> list[Tensor]:
    """As an SAE has them: a transposed matrix, a square one, one as usual, a bias."""
    matrices = [transposed(torch.randn(3, 5)), transposed(torch.randn(4, 4)), torch.randn(5, 3)]
    return [torch.nn.Parameter(w) for w in [*matrices, torch.randn(5)]]


def copies(given: list[Tensor]) -> list[Tensor]:
    """The same weights as torch would have them, row by row."""
    return [torch.nn.Parameter(w.detach().clone().contiguous()) for w in given]


def set_gradients(ours: list[Tensor], theirs: list[Tensor], size: float = 1.0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        other.grad = size * torch.randn(other.shape, dtype=other.dtype)
        one.grad = torch.empty_like(one).copy_(other.grad)


def test_a_transposed_matrix_is_read_as_it_lies_in_memory() -> None:
    w = transposed(torch.randn(3, 5))
    ordered = in_memory_order(w)
    assert ordered.is_contiguous()
    assert ordered.data_ptr() == w.data_ptr()
    assert torch.equal(ordered.T, w)
    for other in (torch.randn(3, 5), torch.randn(5), torch.randn(())):
        assert in_memory_order(other) is other


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_those_of_adam(fused: bool) -> None:
    ours = weights()
    theirs, strides = copies(ours), [w.stride() for w in ours]
    mine = MemoryOrderAdam(ours, lr=0.1, betas=(0.8, 0.95), fused=fused)
    usual = Adam(theirs, lr=0.1, betas=(0.8, 0.95))
    for step in range(5):
        set_gradients(ours, theirs)
        if step == 3:
            ours[0].grad = theirs[0].grad = None  # its moments stay as they are
        mine.step()
        usual.step()
    torch.testing.assert_close(ours, theirs)
    assert [w.stride() for w in ours] == strides
    for one, other in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[one][name], usual.state[other][name])


def groups(given: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": given[:1]}, {"params": given[1:], "lr": 0.02}]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.1, 2.0, 1e6])
def test_clipping_is_that_of_torch_followed_by_adam(
    max_norm: float, dtype: torch.dtype, fused: bool
) -> None:
    """Gradients grow and shrink, so that some steps clip and others do not."""
    ours: list[Tensor] = [torch.nn.Parameter(w.detach().to(dtype)) for w in weights()]
    theirs = copies(ours)
    mine = MemoryOrderAdam(groups(ours), lr=0.1, fused=fused)
    usual = Adam(groups(theirs), lr=0.1)
    for size in (1.0, 0.001, 10.0, 0.01, 0.3):
        set_gradients(ours, theirs, size)
        clip_norm(mine, max_norm)
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        mine.step()
        usual.step()
        # Clipped gradients are what callbacks see from now on, whoever clipped them.
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clipping_passes_over_weights_without_a_gradient() -> None:
    ours = weights()
    mine = MemoryOrderAdam(ours, lr=0.1, fused=True)
    clip_norm(mine, 1.0)
    ours[0].grad = torch.full_like(ours[0], 100.0)
    clip_norm(mine, 1.0)
    mine.step()
    assert ours[0].grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def build_sae() -> ReLUSAE:
    torch.manual_seed(1)
    sae = ReLUSAE(5, 12, 0.1, lr=0.01, decoder_norm="free", b_dec_init="zero", clip_grad_norm=0.5)
    sae.layout = Layout(dense=False, thresholds=(2.0, 2.0))
    return sae


def build_trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "accelerator": "cpu", **arguments}
    return Trainer(callbacks=list(callbacks), **flags)


def batches() -> DataLoader:
    x = torch.randn(8, 16, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(x, batch_size=None)  # type: ignore[arg-type]


class MomentsAtStart(Callback):
    """A run's optimizer as its first step finds it."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.optimizer = trainer.optimizers[0]
        state = self.optimizer.state
        self.moments = {
            name: {key: value.clone() for key, value in state[weight].items()}
            for name, weight in pl_module.named_parameters()
        }
        self.strides = {
            name: state[weight]["exp_avg"].stride() for name, weight in pl_module.named_parameters()
        }


def test_moments_survive_a_checkpoint_and_the_run_goes_on_as_one(tmp_path: Path) -> None:
    straight, stopped, resumed = build_sae(), build_sae(), build_sae()
    build_trainer(max_epochs=2).fit(straight, batches())
    first = build_trainer(max_epochs=1)
    first.fit(stopped, batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    seen = MomentsAtStart()
    build_trainer(seen, max_epochs=2).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")

    assert isinstance(seen.optimizer, MemoryOrderAdam)
    state = first.optimizers[0].state
    for name, weight in stopped.named_parameters():
        for key, value in state[weight].items():
            assert torch.equal(seen.moments[name][key], value)
        assert state[weight]["exp_avg"].abs().max() > 0
        assert seen.strides[name] == weight.stride()  # or the fused step would mix them up
        assert torch.equal(resumed.get_parameter(name), straight.get_parameter(name))


def test_by_default_the_rate_follows_from_the_number_of_latents_and_is_noted() -> None:
    for d_sae, rate in ((64, 8e-3), (1024, 4e-3), (4096, 2e-3)):
        for kind, share in ((ReLUSAE, 1), (JumpReLUSAE, 0.7), (TiedSAE, 0.5)):
            sae = kind(4, d_sae)
            assert sae.lr == sae.hparams["lr"] == pytest.approx(share * rate)
    assert ReLUSAE(4, 64, lr=1e-4).lr == 1e-4
