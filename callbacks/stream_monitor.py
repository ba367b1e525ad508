"""Statistics of the data stream, speed of the run, and shares of its time."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.data.source import ActivationSource, activations_in, source_of
from lightning_sae.distributed.split import copies_of


class StreamMonitor(Callback):
    """Logs what the stream has read and left out, rates, and shares of the time.

    Logged with the losses, every `trainer.log_every_n_steps`; nothing is computed in between.

    - `data/...`: the data module's `statistics`, such as the share left out by each
      filter.
    - `speed/activations_per_second`: trained on, over all ranks, per second of training;
      `speed/tokens_per_second`: read by the language model for it, on this rank.
    - `time/sae`: share of the time in training steps; `time/buffer`: in waiting for the next batch,
      for the shuffle or for new activations; `time/validation`. The rest is logging, checkpoints
      and Lightning itself. `time/language_model` is the share in which the language model ran; it
      overlaps with training steps if the data reads ahead.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(source_of(trainer))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch is None:  # which Lightning skips
            return
        self._activations += activations_in(batch) * copies_of(trainer).n
        self._in_steps += time.perf_counter() - self._step_began
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            data = source_of(trainer)
            statistics = {} if data is None else data.statistics()
            found = {f"data/{name}": value for name, value in statistics.items()}
            pl_module.log_dict(found | self._rates(data))
            self._start(data)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training and not trainer.sanity_checking:
            self._in_validation += time.perf_counter() - self._validation_began

    def _start(self, data: ActivationSource | None) -> None:
        """Start a new time span."""
        self._began = time.perf_counter()
        self._in_steps = self._in_validation = 0.0
        self._activations = 0
        self._seconds, self._seen = _so_far(data)

    def _rates(self, data: ActivationSource | None) -> dict[str, float]:
        """Rates and shares in the span since `_start`."""
        took = time.perf_counter() - self._began
        training = took - self._in_validation
        seconds, seen = _so_far(data)
        found = {
            "speed/activations_per_second": self._activations / training,
            "time/sae": self._in_steps / took,
            "time/validation": self._in_validation / took,
        }
        if seen > self._seen:
            found["speed/tokens_per_second"] = (seen - self._seen) / training
        for name, value in seconds.items():
            found[f"time/{name}"] = (value - self._seconds.get(name, 0.0)) / took
        return found


def _so_far(data: ActivationSource | None) -> tuple[dict[str, float], float]:
    """Seconds by part, and tokens read."""
    return ({}, 0.0) if data is None else (data.seconds(), data.statistics().get("seen", 0.0))
