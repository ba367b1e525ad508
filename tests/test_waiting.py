"""How often a training step makes the CPU wait for a GPU, counted without one.

The code takes the same branches as on a GPU, and all that torch does is looked at: numbers that are
read, indices whose number is not known before, and numbers that are copied to the device.
"""

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.functional.waiting import Behind, Copied, Remembered

READS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2")


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU. Copies in the CPU's memory, and what is made of them, may
    be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        drawn = (kwargs or {}).get("generator") is not None  # by a generator of the CPU
        on_cpu = all(hasattr(x, "on_cpu") for x in given) if given else drawn
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        if (name in READS or by_mask) and not on_cpu:
            self.found[name] += 1
        made = func(*args, **(kwargs or {}))
        for x in tree_iter(made):
            if isinstance(x, Tensor) and on_cpu:
                x.on_cpu = True  # type: ignore[attr-defined]
        return made


class Watch(Callback):
    """Counts the waits of some steps after the first ones."""

    def __init__(self) -> None:
        self.waits, self.steps = Waits(), range(4, 8)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.steps.start:
            self.waits.__enter__()
        if batch_idx == self.steps.stop:
            self.waits.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_sae") and hasattr(module, "waiting_is_slow"):
            monkeypatch.setattr(module, "waiting_is_slow", lambda _: True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    read, number, numbers = Copied.read, torch.tensor, Tensor.tolist

    def read_copy(self: Copied) -> Tensor:
        found = read(self)
        found.on_cpu = True  # type: ignore[attr-defined]
        return found

    def counted_numbers(self: Tensor) -> Any:
        if not hasattr(self, "on_cpu"):
            watch.waits.found["tolist"] += watch.waits in active()
        return numbers(self)

    def counted_number(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        watch.waits.found["tensor"] += device is not None and watch.waits in active()
        made: Tensor = number(*args, **{**kwargs, "device": device})
        if device is None:
            made.on_cpu = True  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(Copied, "read", read_copy)
    monkeypatch.setattr(torch, "tensor", counted_number)
    monkeypatch.setattr(Tensor, "tolist", counted_numbers)
    return watch


def active() -> list[TorchDispatchMode]:
    return torch.utils._python_dispatch._get_current_dispatch_mode_stack()


class Batches(torch.utils.data.IterableDataset[Tensor]):
    """Sparse sums of random features, for as long as they are asked for."""

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(64, 16, generator=generator)
        while True:
            codes = torch.rand(256, 64, generator=generator)
            yield (codes * (codes > 0.9)) @ features


class Layouts(Callback):
    """Notes the layout before each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append((pl_module.layout.dense, pl_module.layout.last_share))


class Saving(Callback):
    """Saves a checkpoint after the third step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def train(
    sae: SparseAutoencoder,
    *callbacks: Callback,
    steps: int = 9,
    ckpt_path: Path | None = None,
) -> None:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
    trainer.fit(sae, loader, ckpt_path=ckpt_path)


SELECTS = {"nonzero": 1}  # the number of active latents, where it is not known before

CASES: dict[str, tuple[Callable[[], SparseAutoencoder], dict[str, int], dict[str, int]]] = {
    "relu": (lambda: ReLUSAE(16, 64), {}, SELECTS),
    "tied": (lambda: TiedSAE(16, 64), {}, SELECTS),
    "gated": (lambda: GatedSAE(16, 64), {}, SELECTS),
    "jumprelu": (lambda: JumpReLUSAE(16, 64, target_l0=4), {}, SELECTS),
    "topk": (lambda: TopKSAE(16, 64, k=4), {}, {}),
    "batch topk": (lambda: BatchTopKSAE(16, 64, k=4), {}, {}),
    "batch topk in chunks": (lambda: BatchTopKSAE(16, 64, k=4, chunk_rows=100), {}, {}),
    "matryoshka": (lambda: MatryoshkaSAE(16, 64, k=4, prefixes=(8, 32, 64)), {}, {"tolist": 1}),
    "drawn": (lambda: MatryoshkaSAE(16, 64, k=4, prefixes=3), {}, {"tolist": 1}),
    "relu to a target": (
        lambda: ReLUSAE(16, 64, target_l0=8),
        {"tolist": 1},
        {"tolist": 1, **SELECTS},
    ),
}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_what_it_needs_and_no_more(name: str, dense: bool, watch: Watch) -> None:
    build, when_dense, when_sparse = CASES[name]
    sae = build()
    sae.layout.thresholds = (-1.0, -0.5) if dense else (1.0, 1.5)
    sae.layout.dense = dense
    train(sae, watch)
    expected = when_dense if dense else when_sparse
    n = len(watch.steps)
    assert {k: found / n for k, found in watch.waits.found.items() if found} == expected


def test_a_step_with_dead_latents_waits_for_them_once(watch: Watch) -> None:
    sae = TopKSAE(16, 64, k=4, revive="auxk", dead_after=256)
    with torch.no_grad():
        sae.b_enc[:8] = -100
    train(sae, watch)
    assert sae.dead[:8].all()
    assert dict(+watch.waits.found) == {"nonzero": len(watch.steps)}


def test_dead_latents_are_found_whatever_changes_the_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(4, 8, k=2, dead_after=50)
    for step in range(300):
        n = int(torch.randint(1, 20, (), generator=generator))
        fired = torch.rand(8, generator=generator) < 0.2
        sae.count_silence(fired.long(), n)
        if step % 37 == 0:
            sae.silent_for[step % 8] = 60  # as a callback may
        if step % 41 == 0:
            sae.load_state_dict({**sae.state_dict(), "silent_for": torch.full((8,), 45)})
        if step % 43 == 0:
            sae = pickle.loads(pickle.dumps(copy.deepcopy(sae))).to(torch.float64)
        if step == 150:
            sae.dead_after = 20
        expected = (sae.silent_for >= sae.dead_after).nonzero().squeeze(-1)
        assert sae.dead_latents().tolist() == expected.tolist()


def test_counts_are_not_read_while_none_can_be_dead(watch: Watch) -> None:
    sae = TopKSAE(4, 8, k=2, dead_after=100)
    fired = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0])
    looked = []
    for _ in range(12):
        with watch.waits:
            sae.dead_latents()
        looked.append(bool(+watch.waits.found))
        watch.waits.found.clear()
        sae.count_silence(fired, 10)
    assert looked == [True] + [False] * 9 + [True, True]


def test_a_loss_that_is_not_finite_is_named_with_its_step_one_step_later() -> None:
    class Spoiled(Batches):
        def __iter__(self) -> Iterator[Tensor]:
            for index, batch in enumerate(super().__iter__()):
                yield batch * (torch.nan if index == 3 else 1)

    trainer = Trainer(max_steps=9, accelerator="cpu", logger=False, enable_checkpointing=False)
    loader = torch.utils.data.DataLoader(Spoiled(), batch_size=None)
    with pytest.raises(FloatingPointError, match=r"step 3; 256 of the batch's 256 activations"):
        trainer.fit(TopKSAE(16, 64, k=4), loader)
    assert trainer.global_step == 4


def test_a_run_goes_on_with_the_layout_it_would_have_had(tmp_path: Path) -> None:
    """Also in the steps in which the share of active latents is not read yet."""
    begun = ReLUSAE(16, 64)
    begun.layout.thresholds = (0.1, 0.2)  # stays dense
    first, then = Layouts(), Layouts()
    train(begun, first, Saving(tmp_path / "3.ckpt"), steps=9)
    again = ReLUSAE(16, 64)
    again.layout.thresholds = begun.layout.thresholds
    train(again, then, steps=9, ckpt_path=tmp_path / "3.ckpt")
    assert then.seen[0] == first.seen[3]
    assert then.seen[0][1] > 0


def test_what_a_progress_bar_shows_is_of_the_step_before() -> None:
    show = Behind()
    shown = [show(torch.tensor([float(i)])).item() for i in range(4)]
    assert shown == [0.0, 0.0, 1.0, 2.0]


def test_a_number_is_read_again_only_when_its_tensor_has_changed(watch: Watch) -> None:
    scalar, remembered = torch.tensor([2.0])[0], Remembered()
    read = []
    for change in (None, None, 3.0, None):
        if change is not None:
            scalar.fill_(change)
        with watch.waits:
            read.append(remembered.of(scalar))
    assert read == [2.0, 2.0, 3.0, 3.0]
    assert watch.waits.found["_local_scalar_dense"] == 2


def test_copies_survive_being_pickled() -> None:
    copied = Copied(torch.tensor([1.0, 2.0]))
    assert pickle.loads(pickle.dumps(copied)).read().tolist() == [1.0, 2.0]
