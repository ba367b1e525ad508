"""Jobs on a language model: the bare model, the activation stream, and whole training runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Trainer
from torch import Tensor, nn

from benchmarks.language_model_source import L1_COEFFICIENT, LR, Source, layer_name
from benchmarks.libraries.base import OURS
from benchmarks.libraries.ours import QUIET
from lightning_sae import ActivationDataModule, ReLUSAE
from lightning_sae.callbacks import DecoderNormProjection


def open_stream(source: Source, **options: Any) -> ActivationDataModule:
    """An `ActivationDataModule` on the model and the text of `source`."""
    return ActivationDataModule(
        f"blocks.{source.layer}.hook_resid_post",
        source.model,
        text=source.text,
        batch_size=source.batch_size,
        context_length=source.context_length,
        blocks_per_pass=source.blocks_per_pass,
        buffer_size=source.buffer_size,
        **{"center": False, "scale": False, **options},
    )


def plain(source: dict[str, Any], n_refills: int) -> dict[str, Any]:
    """Measure the bare `transformers` model, stopped after the layer, in activations per second.

    It reads the same blocks as our stream. BOS tokens are not counted, as the stream drops them.
    """
    from transformers import AutoModelForCausalLM

    where = Source(**source)
    data = open_stream(where)
    tokens_per_pass = where.blocks_per_pass * where.context_length
    n_passes = math.ceil(n_refills * where.buffer_size / 2 / tokens_per_pass)
    tokens = data.training_blocks().read(where.blocks_per_pass * (n_passes + 1))
    first, *passes = tokens.split(where.blocks_per_pass)
    network = AutoModelForCausalLM.from_pretrained(data.model).eval()
    with torch.no_grad(), _stopped(network.get_submodule(layer_name(network, where.layer))):
        _forward(network, first)
        began = perf_counter()
        for blocks in passes:
            _forward(network, blocks)
        seconds = perf_counter() - began
    special = torch.tensor(data.language_model.tokenizer.all_special_ids)
    kept = (~torch.isin(torch.cat(passes), special)).sum().item()
    return {"rate": kept / seconds, "wall": seconds}


class _StoppedError(Exception):
    pass


@contextmanager
def _stopped(layer: nn.Module) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _StoppedError

    handle = layer.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _forward(network: Any, blocks: Int[Tensor, "batch seq"]) -> None:
    with suppress(_StoppedError):
        network(blocks, use_cache=False)


def stream(source: dict[str, Any], prefetch: bool, n_refills: int) -> dict[str, Any]:
    """Measure our activation stream with no training, in activations per second.

    The clock runs from one refill of the buffer to the `n_refills`-th after it, so that as much is
    read ahead at the start as at the end.
    """
    where = Source(**source)
    data = open_stream(where, prefetch=prefetch)
    batches = iter(data.train_dataloader())
    assert data.buffer is not None
    per_refill = data.buffer.rows_per_refill // where.batch_size
    _take(batches, per_refill + 1)
    began = perf_counter()
    _take(batches, n_refills * per_refill)
    seconds = perf_counter() - began
    data.buffer.close()
    return {"rate": n_refills * per_refill * where.batch_size / seconds, "wall": seconds}


def _take(batches: Iterator[Tensor], n: int) -> None:
    for _ in islice(batches, n):
        pass


def fit(
    library: str, source: dict[str, Any], d_sae: int, n_steps: int, variant: str = ""
) -> dict[str, Any]:
    """Measure a whole training run, from the call that starts it until it returns.

    The model and the text are opened before. Activations are scaled to a mean norm of sqrt(d_in).

    Returns:
        `rate` (activations per second), `wall` (seconds), and on held-out activations `l0` and
        `fvu`, the fraction of variance unexplained.
    """
    where = Source(**source)
    data = open_stream(where, scale=True, n_validation=8192)
    data.training_blocks().read(1)
    if library == OURS:
        train = _our_run(data, d_sae, n_steps)
    else:
        # Here, for SAELens is installed only where it is compared with.
        from benchmarks.libraries.saelens import language_model_run

        train = language_model_run(where, data, d_sae, n_steps, variant)
    began = perf_counter()
    sae = train()
    wall = perf_counter() - began
    return {"rate": n_steps * where.batch_size / wall, "wall": wall, **_held_out(sae, data)}


def _our_run(data: ActivationDataModule, d_sae: int, n_steps: int) -> Callable[[], Any]:
    rates: dict[str, Any] = {"lr": LR, "lr_warmup_steps": 0, "lr_decay_steps": 0}
    sae = ReLUSAE(data.d_in, d_sae, l1_coefficient=L1_COEFFICIENT, **rates)
    projection = DecoderNormProjection()
    trainer = Trainer(max_steps=n_steps, limit_val_batches=0, callbacks=projection, **QUIET)

    def train() -> ReLUSAE:
        trainer.fit(sae, datamodule=data)
        return sae

    return train


@torch.no_grad()
def _held_out(sae: Any, data: ActivationDataModule) -> dict[str, float]:
    x: Float[Tensor, "batch d_in"] = torch.cat(list(data.val_dataloader()))
    f = sae.encode(x)
    error = (sae.decode(f) - x).pow(2).sum()
    return {
        "l0": f.count_nonzero().item() / len(x),
        "fvu": (error / (x - x.mean(0)).pow(2).sum()).item(),
    }
