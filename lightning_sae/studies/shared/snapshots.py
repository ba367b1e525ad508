"""How often latents fire while an SAE is trained, window by window."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from lightning_sae.checks import require_positive
from lightning_sae.files import write_atomically


class Snapshots(NamedTuple):
    """Firings of an SAE's latents on its training activations.

    Attributes:
        steps: Optimizer steps at the end of each window.
        n: Activations in each window.
        counts: On how many of them each latent fired.
    """

    steps: Int[Tensor, " windows"]
    n: Int[Tensor, " windows"]
    counts: Int[Tensor, "windows d_sae"]

    def frequency(self, end: int, last: int = 1) -> Float[Tensor, " d_sae"]:
        """Share of activations on which each latent fires, over `last` windows up to window `end`.

        Args:
            end: Index of the last window; negative ones count from the end.
            last: Number of windows; all up to `end` if there are fewer.
        """
        end = end % len(self.steps) + 1
        part = slice(max(0, end - last), end)
        return self.counts[part].sum(0).double() / self.n[part].sum()


def frequencies_path(folder: Path, name: str) -> Path:
    """The file of an SAE's snapshots in the folder of a seed."""
    return folder / "frequencies" / f"{name}.safetensors"


def read_snapshots(path: Path) -> Snapshots:
    """Read what `FrequencySnapshots` wrote."""
    found = load_file(path)
    return Snapshots(found["steps"], found["n"], found["counts"])


class FrequencySnapshots(Callback):
    """Counts each latent's firings on training activations, in windows of some steps.

    After each window the file is rewritten with all windows so far. Weights change within a window,
    so frequencies are averages over a stretch of training. A resumed run is exact.

    Args:
        path: The file to write, `.safetensors`.
        every_n_steps: Optimizer steps in a window.

    Raises:
        ValueError: If `every_n_steps` is not positive.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        require_positive(every_n_steps=every_n_steps)
        self.path, self.every_n_steps = path, every_n_steps
        self._reset()

    def _reset(self) -> None:
        self._steps: list[int] = []
        self._n: list[int] = []
        self._counts: list[Tensor] = []
        self._open = torch.zeros((), dtype=torch.int64)  # [d_sae] from the first batch on
        self._n_open = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; resuming loads its state after this."""
        if stage == "fit":
            self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step of the first batch."""
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and close the window after its last step."""
        fired = trainer.strategy.reduce(outputs["fired"].clone(), reduce_op="sum")
        self._open = self._open.to(fired.device) + fired
        self._n_open += len(batch) * trainer.world_size
        step, self._step = self._step, trainer.global_step
        # Under gradient accumulation not every batch completes a step.
        if self._step > step and self._step % self.every_n_steps == 0:
            self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        self._steps.append(trainer.global_step)
        self._n.append(self._n_open)
        self._counts.append(self._open.to("cpu", torch.int32))
        self._open, self._n_open = torch.zeros_like(self._open), 0
        if trainer.is_global_zero:
            state = {
                "steps": torch.tensor(self._steps),
                "n": torch.tensor(self._n),
                "counts": torch.stack(self._counts),
            }
            write_atomically(self.path, lambda temporary: save_file(state, temporary))

    @override
    def state_dict(self) -> dict[str, Any]:
        """All windows, and the one that is open."""
        return {
            "steps": list(self._steps),
            "n": list(self._n),
            "counts": list(self._counts),
            "open": self._open,
            "n_open": self._n_open,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._steps, self._n = list(state_dict["steps"]), list(state_dict["n"])
        self._counts = list(state_dict["counts"])
        self._open, self._n_open = state_dict["open"], state_dict["n_open"]
