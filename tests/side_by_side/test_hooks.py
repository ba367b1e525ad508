"""A member's callback and its SAE get each hook that they would get if trained alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import ReLUSAE, SideBySide

HOOKS = [
    name
    for name, value in vars(Callback).items()
    if callable(value) and not name.startswith("_") and not name.endswith("state_dict")
]
NARROW, WIDE = "blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"


def shaped(value: Any) -> Any:
    """What can be compared of an argument: shapes, dtypes, numbers and types."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict) and "state_dict" not in value and "callbacks" not in value:
        return {key: shaped(entry) for key, entry in value.items()}
    return value if isinstance(value, int | str | None) else type(value)


class Recorder(Callback):
    """Notes the hooks that are called, with their arguments' shapes and whether under autocast."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def note(self, owner: str, hook: str, *args: Any) -> None:
        self.calls.append(
            (owner, hook, [shaped(a) for a in args], torch.is_autocast_enabled("cpu"))
        )

    def state_dict(self) -> dict[str, Any]:
        self.note("callback", "state_dict")
        return {"saved": True}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.note("callback", "load_state_dict", state_dict)


class Recorded(ReLUSAE):
    """An SAE whose own hooks are noted, too, and whose steps on held-out data give something."""

    recorder: Recorder
    fails = False

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().validation_step(batch, batch_idx)
        if self.fails:
            raise RuntimeError("It fails.")
        return {"norms": batch.norm(dim=1)}

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().test_step(batch, batch_idx)
        return batch.sum(0)


def noted_by_callback(hook: str) -> Any:
    def method(self: Recorder, trainer: Trainer, module: Any, *args: Any, **named: Any) -> None:
        assert isinstance(module, Recorded)
        assert trainer.lightning_module is module
        self.note("callback", hook, *args, *named.values())

    return method


def noted_by_sae(hook: str) -> Any:
    def method(self: Recorded, *args: Any, **named: Any) -> None:
        self.recorder.note("sae", hook, *args, *named.values())
        getattr(ReLUSAE, hook)(self, *args, **named)

    return method


for name in HOOKS:
    setattr(Recorder, name, noted_by_callback(name))
    if hasattr(LightningModule, name):
        setattr(Recorded, name, noted_by_sae(name))


def recorded(d_in: int) -> tuple[Recorded, Recorder]:
    torch.manual_seed(0)
    sae, recorder = Recorded(d_in, 12, decoder_norm="free"), Recorder()
    sae.recorder = recorder
    return sae, recorder


def a_trainer(*callbacks: Callback, **flags: Any) -> Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, **flags}
    settings |= {"num_sanity_val_steps": 1, **dict.fromkeys(silent, False)}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)


def loader(batches: Any) -> Any:
    return DataLoader(batches, batch_size=None)


def stages(module: Any, batches: Any, *callbacks: Callback, **flags: Any) -> Iterator[str]:
    """Runs each stage of Lightning in turn, and tells its name when it has ended."""
    trainer, data = a_trainer(*callbacks, **flags), loader(batches)
    trainer.fit(module, data, data)
    yield "fit"
    trainer.save_checkpoint(Path("last.ckpt"))
    yield "save"
    trainer.validate(module, data, verbose=False)
    yield "validate"
    trainer.test(module, data, verbose=False)
    yield "test"
    trainer.predict(module, data)
    yield "predict"
    trainer.predict(module, data, return_predictions=False)
    yield "predict without keeping"
    again = a_trainer(*callbacks, **{**flags, "max_epochs": 3})
    again.fit(module, data, data, ckpt_path="last.ckpt")
    yield "resume"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_member_gets_the_hooks_that_it_would_get_alone(precision: Any) -> None:
    batches = [{NARROW: torch.randn(8, 4), WIDE: torch.randn(8, 6)} for _ in range(4)]
    found: dict[str, dict[str, list[Any]]] = {NARROW: {}, WIDE: {}}
    of_members = {hook: recorded(d_in) for hook, d_in in ((NARROW, 4), (WIDE, 6))}
    together = SideBySide(
        [
            {"name": f"m{i}", "hook_name": hook, "sae": sae, "callbacks": [recorder]}
            for i, (hook, (sae, recorder)) in enumerate(of_members.items())
        ]
    )
    for stage in stages(together, batches, precision=precision):
        for hook, (_, recorder) in of_members.items():
            found[hook][stage] = recorder.calls
            recorder.calls = []
    seen = set()
    for hook, d_in in ((NARROW, 4), (WIDE, 6)):
        sae, recorder = recorded(d_in)
        own = [batch[hook] for batch in batches]
        for stage in stages(sae, own, recorder, precision=precision):
            assert found[hook].pop(stage) == recorder.calls, stage
            seen |= {name for owner, name, *_ in recorder.calls if owner == "callback"}
            recorder.calls = []
    assert seen == {*HOOKS, "state_dict", "load_state_dict"} - {"on_exception"}
    assert found == {NARROW: {}, WIDE: {}}


def test_a_member_is_told_of_an_exception_as_it_would_be_alone() -> None:
    batches = torch.randn(4, 8, 4)
    calls = []
    for together in (False, True):
        sae, recorder = recorded(4)
        sae.fails = True
        member = {"name": "a", "sae": sae, "callbacks": [recorder]}
        module, callbacks = (SideBySide([member]), []) if together else (sae, [recorder])
        with pytest.raises(RuntimeError, match="It fails"):
            a_trainer(*callbacks).fit(module, loader(batches), loader(batches))
        calls.append(recorder.calls)
    assert calls[0] == calls[1]
    assert ("callback", "on_exception", [RuntimeError], False) in calls[0]


def test_a_trainer_that_goes_on_to_another_module_leaves_the_members_alone() -> None:
    batches = torch.randn(4, 8, 4)
    sae, recorder = recorded(4)
    trainer = a_trainer(max_epochs=1)
    together = SideBySide([{"name": "a", "sae": sae, "callbacks": [recorder]}])
    trainer.fit(together, loader(batches), loader(batches))
    recorder.calls = []
    trainer.fit_loop.max_epochs = 2
    trainer.fit(ReLUSAE(4, 12, decoder_norm="free"), loader(batches), loader(batches))
    assert recorder.calls == []


class Writer(BasePredictionWriter):
    """Would be given indices and predictions of the whole run."""


def test_a_writer_of_predictions_is_refused() -> None:
    batches = torch.randn(2, 8, 4)
    sae = ReLUSAE(4, 12, decoder_norm="free")
    together = SideBySide([{"name": "a", "sae": sae, "callbacks": [Writer("epoch")]}])
    trainer = a_trainer(max_epochs=1)
    trainer.fit(together, loader(batches), loader(batches))  # which predicts nothing
    message = "Member `a`: .*`on_predict_epoch_end`.* but got Writer: write .* plain `Callback`"
    with pytest.raises(ValueError, match=message):
        trainer.predict(together, loader(batches))


def test_callbacks_that_an_sae_brings_come_once_however_many_stages_follow(tmp_path: Path) -> None:
    class Brought(Callback):
        pass

    class Bringing(ReLUSAE):
        def configure_callbacks(self) -> list[Callback]:
            return [Brought()]

    model = SideBySide([{"name": "one", "sae": Bringing(4, 6, decoder_norm="free")}])
    rows = torch.randn(32, 4)
    for _ in range(2):
        run = Trainer(
            accelerator="cpu",
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        run.fit(model, DataLoader(rows, batch_size=16))  # type: ignore[arg-type]
    assert [type(callback) for callback in model.members[0].callbacks] == [Brought]
