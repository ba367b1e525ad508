"""The figures of `lightning-sae bench` as a table."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Figures by name, in seconds, bytes and activations per second."""

    figures: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def predict(self, max_steps: int) -> None:
        """Add the duration of a run of `max_steps` steps."""
        f = self.figures
        if max_steps > 0:
            together = f["batch_size"] / f["together_activations_per_second"]
            f["planned_steps"] = max_steps
            f["planned_activations"] = max_steps * f["batch_size"]
            f["planned_hours"] = max_steps * together / 3600

    def lines(self) -> Iterator[str]:
        """The figures as a table."""
        f = self.figures
        yield (
            f"{f['architecture']}, d_in {f['d_in']}, d_sae {f['d_sae']}, L0 {f['l0']:.1f}; "
            f"batches of {f['batch_size']}; {f['device']}, {f['threads']} threads"
        )
        yield f"{'a training step':<42}{'ms':>10}{'share':>9}"
        for name, key in STAGES.items():
            yield self._row(name, f[key], f["step_seconds"])
        yield self._row("whole step (median)", f["step_seconds"], f["step_seconds"])
        yield self._row("floor: dense product and optimizer", f["floor_seconds"], f["step_seconds"])
        yield f"the step is {f['step_seconds'] / f['floor_seconds']:.2f} times the floor"
        yield from self._whole_run()

    def _whole_run(self) -> Iterator[str]:
        f = self.figures
        yield ""
        yield f"{'rates':<42}{'activations/s':>15}"
        for name, key in RATES.items():
            yield f"  {name:<40}{f[key]:>15,.0f}"
        yield ""
        yield f"{'memory':<42}{'MiB':>10}"
        for name, key in MEMORY.items():
            if f[key] is not None:
                yield f"  {name:<40}{f[key] / 2**20:>10,.0f}"
        if "planned_hours" in f:
            yield ""
            yield (
                f"a run of {f['planned_steps']:,} steps, {f['planned_activations']:,} activations: "
                f"{f['planned_hours']:.2f} hours, without validation"
            )

    def _row(self, name: str, seconds: float, whole: float) -> str:
        return f"  {name:<40}{1e3 * seconds:>10.2f}{seconds / whole:>9.0%}"


class MembersReport(Report):
    """The figures of several SAEs side by side, one line each."""

    def lines(self) -> Iterator[str]:
        """The figures as tables."""
        f = self.figures
        members, work = f["members"], f["step_seconds"] + f["stream_seconds"]
        names = [member["name"] for member in members]
        width = max(len(name) for name in (*names, *IN_COMMON)) + 2
        hooks = ", ".join(f["hook_names"]) or "one hook"
        yield f"{len(members)} SAEs at {hooks}"
        yield f"batches of {f['batch_size']}; {f['device']}, {f['threads']} threads"
        yield ""
        yield f"{'milliseconds for a batch':<{width}}" + "".join(
            f"{column:>11}"
            for column in ("L0", "gradients", "optimizer", "rest", "step", "share", "MiB")
        )
        for member in members:
            stages = "".join(f"{1e3 * member[f'{name}_seconds']:>11.2f}" for name in MEMBER_STAGES)
            yield (
                f"{member['name']:<{width}}{member['l0']:>11.1f}{stages}"
                f"{member['step_seconds'] / work:>11.1%}{member['state_bytes'] / 2**20:>11.1f}"
            )
        for name, key in IN_COMMON.items():
            if f[key] is not None:
                seconds = f[key]
                yield f"{name:<{width}}{1e3 * seconds:>55.2f}{seconds / work:>11.1%}"
        yield f"{'total':<{width}}{1e3 * work:>55.2f}{1:>11.1%}"
        yield (
            "MiB are those of weights, gradients and moments. In a run, the stream is read during "
            f"training: a batch takes {1e3 * f['together_seconds']:.2f} ms"
        )
        yield from self._whole_run()


STAGES = {
    "forward": "forward_seconds",
    "  dense product alone": "product_seconds",
    "backward": "backward_seconds",
    "norms, clipping, optimizer": "optimizer_seconds",
    "callbacks, logging, Lightning": "rest_seconds",
}
MEMBER_STAGES = ("gradient", "optimizer", "rest", "step")
IN_COMMON = {
    "all members": "members_seconds",
    "logging, Lightning": "rest_seconds",
    "the stream, once for all": "stream_seconds",
    "  language model alone": "language_model_seconds",
}
RATES = {
    "training alone": "training_activations_per_second",
    "stream alone": "stream_activations_per_second",
    "both, as in a run": "together_activations_per_second",
}
MEMORY = {
    "weights, gradients, moments": "state_bytes",
    "a checkpoint, buffer included": "checkpoint_bytes",
    "shuffling buffer": "buffer_bytes",
    "peak of this process": "peak_bytes",
}
