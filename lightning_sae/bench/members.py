"""Cost of each of several SAEs side by side, and their shared cost."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeVar

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, Trainer

from lightning_sae.bench.fits import (
    WARM_UP,
    Repeated,
    StepClock,
    batches_of_two_refills,
    fit,
    hold_still,
    language_model_seconds,
    machine,
    norm_callbacks,
    now,
    read_stream,
    set_l0,
    sizes,
    tell,
    weight_bytes,
)
from lightning_sae.bench.report import MembersReport
from lightning_sae.data import ActivationSource
from lightning_sae.data.source import activations_in
from lightning_sae.side_by_side import SideBySide
from lightning_sae.side_by_side.member import Member

T = TypeVar("T")

PARTS = ("start_batch", "forward_and_backward", "step", "end_batch")
"""Methods of `Member` that make up its training step."""


def measure_members(
    trainer: Trainer, model: SideBySide, data: LightningDataModule, l0: float, steps: int
) -> MembersReport:
    """Measure several SAEs side by side; see `BenchTrainer.bench`."""
    device = trainer.strategy.root_device
    for member in model.members:
        hold_still(member.sae)
        member.callbacks = norm_callbacks(member.sae)  # others write files, or change weights
    cycle = batches_of_two_refills(data, steps)
    tell("the stream")
    fit(trainer, model, 1, datamodule=data)  # members adopt the data's scaling and mean
    batches, stream = read_stream(data, cycle)
    language_model = language_model_seconds(data)
    inputs = [move_data_to_device(batch, device) for batch in batches]
    model.to(device)
    l0s = [set_l0(each.sae, [each.rows(batch) for batch in inputs], l0) for each in model.members]
    tell(f"{steps} steps of {len(model.members)} SAEs")
    members, whole = _steps(trainer, model, Repeated(batches), steps)
    run = StepClock(device.type)
    tell("both together")
    fit(trainer, model, cycle + WARM_UP, datamodule=data, callbacks=[run])
    n, together = activations_in(batches[0]), run.seconds_per_batch()
    return MembersReport(
        {
            "members": [one | {"l0": l0} for one, l0 in zip(members, l0s, strict=True)],
            "hook_names": list(data.hook_names) if isinstance(data, ActivationSource) else [],
            "batch_size": n,
            **whole,
            "stream_seconds": n / stream,
            "language_model_seconds": None if language_model is None else n * language_model,
            "together_seconds": together,
            "training_activations_per_second": n / whole["step_seconds"],
            "stream_activations_per_second": stream,
            "together_activations_per_second": n / together,
            **sizes(model, data, device),
            **machine(device),
        }
    )


def _steps(
    trainer: Trainer, model: SideBySide, batches: Repeated, n: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Figures of each member, and of the step of all members together."""
    accelerator = trainer.strategy.root_device.type
    clock, clocks = StepClock(accelerator), [MemberClock(m, accelerator) for m in model.members]
    fit(trainer, model, n + WARM_UP + 1, batches, callbacks=[clock])
    for each in clocks:
        each.remove()
    wholes = clock.from_start_to_start()
    # The last step has no next one, whose start would be its end.
    of_members = [sum(parts) for parts in zip(*(each.steps()[:-1] for each in clocks), strict=True)]
    rest = [whole - parts for whole, parts in zip(wholes, of_members, strict=True)]
    return [each.figures() for each in clocks], {
        "members_seconds": median(of_members),
        "rest_seconds": median(rest),
        "step_seconds": median(wholes),
    }


class MemberClock:
    """Records the time of each step of a member until it is removed.

    Args:
        member: The member.
        accelerator: Kind of its device.
    """

    def __init__(self, member: Member, accelerator: str) -> None:
        self.member, self.accelerator = member, accelerator
        self.times: dict[str, list[float]] = {}
        for part in PARTS:
            # Replaces the methods, because members take turns within each of them.
            vars(member)[part] = self._timed(getattr(member, part), self.times.setdefault(part, []))

    def _timed(self, method: Callable[..., T], times: list[float]) -> Callable[..., T]:
        def timed(*args: Any) -> T:
            started = now(self.accelerator)
            result = method(*args)
            times.append(now(self.accelerator) - started)
            return result

        return timed

    def remove(self) -> None:
        """Restore the member's methods."""
        for part in PARTS:
            del vars(self.member)[part]

    def steps(self, parts: Sequence[str] = PARTS) -> list[float]:
        """Seconds of the given methods in each step after the warm-up."""
        return [sum(times) for times in zip(*(self.times[p] for p in parts), strict=True)][WARM_UP:]

    def figures(self) -> dict[str, Any]:
        """Medians after the warm-up, and bytes of weights, gradients and moments."""
        sae = self.member.sae
        return {
            "name": self.member.name,
            "hook_name": self.member.hook_name,
            "architecture": type(sae).__name__,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "gradient_seconds": median(self.steps(("forward_and_backward",))),
            "optimizer_seconds": median(self.steps(("step",))),
            "rest_seconds": median(self.steps(("start_batch", "end_batch"))),
            "step_seconds": median(self.steps()),
            "state_bytes": 4 * weight_bytes(sae),
        }
