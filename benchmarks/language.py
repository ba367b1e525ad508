"""The activation stream and whole runs on a language model."""

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

from benchmarks.libraries.base import OURS
from benchmarks.source import Source
from lightning_sae import ActivationDataModule, ReLUSAE
from lightning_sae.callbacks import DecoderNormProjection

L1_COEFFICIENT = 2.0  # on activations scaled to a mean norm of sqrt(d_in)
LR = 1e-3


def open_stream(source: Source, **options: Any) -> ActivationDataModule:
    """Our stream of a source."""
    return ActivationDataModule(
        f"blocks.{source.layer}.hook_resid_post",
        source.model,
        text=source.text,
        batch_size=source.batch_size,
        context_length=source.context_length,
        blocks_per_pass=source.blocks_per_pass,
        buffer_size=source.buffer_size,
        **options,
    )


def plain(source: dict[str, Any], n_refills: int) -> dict[str, Any]:
    """Activations per second of the bare `transformers` model, stopped behind the layer.

    On the blocks that our stream reads; BOS tokens, which it drops, do not count.
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


def layer_name(network: Any, layer: int) -> str:
    """Path of a layer in a `transformers` model."""
    n = network.config.num_hidden_layers
    lists = (k for k, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    return f"{next(lists)}.{layer}"


def stream(source: dict[str, Any], prefetch: bool, n_refills: int) -> dict[str, Any]:
    """Activations per second that the stream gives to who only takes them.

    From one refill of the buffer to the `n_refills`-th after it, so that what is read ahead at the
    start and at the end is the same.
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
    """Activations per second of a whole run, from the call that starts it until it returns.

    The model and the text are opened before. Activations are scaled to a mean norm of sqrt(d_in).

    Returns:
        `rate`, `wall`, and L0 and share of variance left over on held-out activations.
    """
    where = Source(**source)
    data = open_stream(where, scale=True, n_validation=8192)
    data.training_blocks().read(1)
    if library == OURS:
        train = _our_run(data, d_sae, n_steps)
    else:
        from benchmarks.libraries.saelens import language_model_run

        train = language_model_run(where, data, d_sae, n_steps, variant)
    began = perf_counter()
    sae = train()
    wall = perf_counter() - began
    return {"rate": n_steps * where.batch_size / wall, "wall": wall, **_held_out(sae, data)}


def _our_run(data: ActivationDataModule, d_sae: int, n_steps: int) -> Callable[[], Any]:
    from benchmarks.libraries.ours import QUIET

    sae = ReLUSAE(data.d_in, d_sae, l1_coefficient=L1_COEFFICIENT, lr=LR)
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
