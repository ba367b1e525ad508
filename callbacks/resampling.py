"""Resampling of dead latents."""

import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.callbacks.moments import reset_moments
from lightning_sae.checks import expect, refuse_second
from lightning_sae.distributed.parts import ALONE
from lightning_sae.distributed.split import copies_of
from lightning_sae.distributed.undrawn import without_drawing
from lightning_sae.functional.geometry import random_unit_rows, unit_rows
from lightning_sae.functional.resampling import dead_latents, mean_norm, sample_directions
from lightning_sae.training.lengths import (
    Length,
    is_share,
    refuse_lengths,
    require_lengths,
    steps_of,
    unknown,
)


class DeadFeatureResampling(Callback):
    """Give latents that do not fire new directions, at intervals of optimizer steps.

    Firings are counted on all training activations of the last `window` steps, over micro-batches
    and ranks. Then the dead latents are replaced:

    - `loss_squared`: latents that never fired. Inputs are drawn with probability proportional to
      the square of their squared error, each measured in its own training step. The decoder row
      becomes the encoder's input for it, scaled to norm 1. The encoder row gets the same direction,
      with `encoder_scale` times the mean norm of the alive encoder rows (1 if there are none).
      Source: Bricken et al., Towards Monosemanticity (2023).
    - `reinitialize`: latents that fired on less than `min_frequency` of the inputs. The decoder row
      becomes a random direction of norm 1 and the encoder row its transpose, as at the start of
      training. Source: Neel Nanda's open-source replication (2023).

    In both schemes, the latent's `b_enc` becomes 0, thresholds and the like get their initial
    values, and the optimizer's moments of these entries and `silent_for` become zero. `b_dec` and
    all other latents do not change. A tied latent has only the decoder row. With
    `decoder_norm="free"`, new decoder rows get the mean norm of the alive ones. Nothing is
    replaced after the last step of a run, because it would not be trained.

    The number of replaced latents is logged as `train/resampled`. Random numbers come from a
    separate generator that is saved with the counts, so a resumed run is exact.

    Example::

        trainer = Trainer(
            callbacks=DeadFeatureResampling(every_n_steps=2500, stop_after_step=10_000),
            max_steps=20_000,
        )

    Lengths are in optimizer steps, or shares of `trainer.max_steps` between 0 and 1.

    Args:
        every_n_steps: Length from one resampling to the next.
        scheme: `loss_squared` or `reinitialize`.
        window: Length before a resampling over which firings are counted; null for all of it.
        min_frequency: With `reinitialize`, the frequency below which a latent is replaced.
        n_inputs: With `loss_squared`, number of latest inputs to draw from, over all ranks. Each
            rank keeps its own in memory.
        encoder_scale: With `loss_squared`, norm of a new encoder row relative to alive ones.
        max_resamplings: Number of resamplings in a run, including those without dead latents; null
            for no limit.
        stop_after_step: Last optimizer step after which latents may be resampled, or a share of the
            run; null for no limit.
        seed: Seed of the generator.

    Raises:
        ValueError: If an argument is out of range; when fitting starts, if the run is too short
            for a single resampling, or of unknown length although an argument is a share of it, if
            the module has neither `W_enc`, `W_dec` and `b_enc` nor tied weights, if its optimizer
            is not a variant of Adam, or if the trainer has this callback twice.
    """

    length_names = ("every_n_steps", "window", "stop_after_step")
    _total = -1  # steps of the run, once it is known

    def __init__(
        self,
        every_n_steps: Length,
        scheme: Literal["loss_squared", "reinitialize"] = "loss_squared",
        *,
        window: Length | None = None,
        min_frequency: float = 1e-5,
        n_inputs: int = 8192,
        encoder_scale: float = 0.2,
        max_resamplings: int | None = None,
        stop_after_step: Length | None = None,
        seed: int = 0,
    ) -> None:
        window = every_n_steps if window is None else window
        schemes = ("loss_squared", "reinitialize")
        require_lengths(1, every_n_steps=every_n_steps, window=window)
        if stop_after_step is not None:
            require_lengths(1, stop_after_step=stop_after_step)
        expect(scheme in schemes, "scheme", f"one of {schemes}", scheme)
        expect(0 < min_frequency < 1, "min_frequency", "between 0 and 1", min_frequency)
        expect(n_inputs > 0, "n_inputs", "positive", n_inputs)
        expect(encoder_scale > 0, "encoder_scale", "positive", encoder_scale)
        allowed = max_resamplings is None or max_resamplings > 0
        expect(allowed, "max_resamplings", "positive, or null for no limit", max_resamplings)
        self.every_n_steps, self.scheme, self.window = every_n_steps, scheme, window
        self.min_frequency, self.encoder_scale = min_frequency, encoder_scale
        self.n_inputs, self.seed = n_inputs, seed
        self.max_resamplings, self.stop_after_step = max_resamplings, stop_after_step
        given = self._lengths()
        if len(set(map(is_share, given.values()))) == 1:  # otherwise checked later
            for problem in _out_of_order(**given):
                raise ValueError(problem)
        self._fired: Tensor
        self._inputs: list[Tensor]
        self._losses: list[Tensor]
        self._place: list[int] | None  # rank, and number of ranks
        self._start_afresh()

    def next_resampling(self, step: int) -> int | None:
        """The optimizer step after which the next resampling happens, once `step` steps are taken.

        None if there is no other. The result is larger than `step`.
        """
        every = self._steps("every_n_steps")
        due = (step // every + 1) * every
        spent = self.max_resamplings is not None and self._n_done >= self.max_resamplings
        late = self.stop_after_step is not None and due > self._steps("stop_after_step")
        return None if spent or late else due

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the SAE and reset the state; a resume loads its state after this."""
        if stage != "fit":
            return
        self._start_afresh()
        self._total = trainer.max_steps
        if not isinstance(pl_module, SparseAutoencoder) or not _is_replaceable(pl_module):
            raise ValueError(
                "`DeadFeatureResampling` needs an SAE with untied parameters `W_enc`, `W_dec` and "
                "`b_enc` that are all trained, or one whose `tied` is true, which "
                f"{type(pl_module).__name__} is not: remove the callback."
            )
        refuse_second(trainer, self)
        refuse_lengths(trainer, pl_module)

    def length_problems(self, total: int) -> list[str]:
        """Error messages about the lengths in a run of `trainer.max_steps`."""
        given = self._lengths()
        if problems := unknown(total, **given):
            return problems
        in_steps = {name: steps_of(length, total, name) for name, length in given.items()}
        problems = _out_of_order(**in_steps)
        if 0 < total <= self.every_n_steps:
            problems.append(
                f"Expected argument `every_n_steps` to be less than `trainer.max_steps`={total} "
                f"but got {self.every_n_steps}: lower it, give a share of the run, as 0.1, or "
                "remove the callback."
            )
        return problems

    def _lengths(self) -> dict[str, Length]:
        """The lengths that are not None."""
        found = {name: getattr(self, name) for name in self.length_names}
        return {name: length for name, length in found.items() if length is not None}

    def _steps(self, name: str) -> int:
        return steps_of(getattr(self, name), self._total, name)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers other than variants of Adam, whose state is reset in part."""
        for optimizer in trainer.optimizers:
            if "betas" not in optimizer.defaults:
                raise ValueError(
                    "`DeadFeatureResampling` resets the moments of Adam and its variants but the "
                    f"optimizer is {type(optimizer).__name__}: use one or remove the callback."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step of the first batch; drop inputs and counts of other ranks."""
        self._parts = cast(SparseAutoencoder, pl_module).parts
        if self._fired.dim():
            self._fired = self._parts.own(self._fired)
        self._step = trainer.global_step
        place = [*copies_of(trainer)[:2]]
        own = self._place in (None, place)
        if trainer.world_size > 1:  # all keep theirs or none: they must have equally many
            own = trainer.strategy.reduce_boolean_decision(own)
        if not own:
            self._inputs, self._losses = [], []
        self._place = place

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Float[Tensor, "batch d_in"] | None,
        batch_idx: int,
    ) -> None:
        """Count the batch, and resample if it completes a step after which that is due."""
        if batch is None:  # which Lightning skips
            return
        # global_step counts steps taken: the last micro-batch of a step has already raised it.
        step, self._step = self._step, trainer.global_step
        due = self.next_resampling(step)
        if due is None:
            return
        self._count(trainer, cast(dict[str, Tensor], outputs), batch, steps_left=due - step)
        if trainer.global_step >= due:
            if trainer.global_step != trainer.max_steps:
                self._resample(trainer, cast(SparseAutoencoder, pl_module))
            self._forget_window()
            self._n_done += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counts and this rank's inputs of the window, resamplings done, and the generator.

        Of a split dictionary the counts are of all latents, so all ranks have to call this.
        """
        return {
            "fired": self._parts.joined(self._fired) if self._fired.dim() else self._fired,
            "n_counted": self._n_counted,
            "inputs": list(self._inputs),
            "losses": list(self._losses),
            "n_done": self._n_done,
            "generator": self._generator.get_state(),
            "place": self._place,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._fired, self._n_counted = state_dict["fired"], state_dict["n_counted"]
        self._inputs, self._losses = list(state_dict["inputs"]), list(state_dict["losses"])
        self._n_done = state_dict["n_done"]
        self._generator.set_state(state_dict["generator"])
        self._place = state_dict["place"]

    def _start_afresh(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._n_done = 0
        self._place = None
        self._parts = ALONE
        self._forget_window()

    def _forget_window(self) -> None:
        self._fired = torch.zeros((), dtype=torch.int64)  # [d_sae] from the first batch on
        self._n_counted = 0
        self._inputs, self._losses = [], []

    def _count(
        self, trainer: Trainer, outputs: dict[str, Tensor], batch: Tensor, steps_left: int
    ) -> None:
        copies = copies_of(trainer)
        n_rows = len(batch) * copies.n
        if steps_left <= self._steps("window"):
            # Summed over ranks batch by batch, so that the checkpoint of rank 0 holds all counts.
            # `reduce` works in place, and other callbacks read the outputs too.
            fired = outputs["fired"].clone()
            fired = trainer.strategy.reduce(fired, copies.group, reduce_op="sum")
            self._fired = self._fired.to(fired.device) + fired
            self._n_counted += n_rows
        if self.scheme == "loss_squared" and steps_left <= math.ceil(self.n_inputs / n_rows):
            self._keep(batch, outputs["squared_error"], copies.n)

    def _keep(self, inputs: Tensor, losses: Tensor, n_ranks: int) -> None:
        inputs, losses = inputs.detach()[-self.n_inputs :], losses.detach()[-self.n_inputs :]
        self._inputs.append(inputs.clone())  # a batch may be a view of a buffer in use
        self._losses.append(losses.clone())
        n = sum(map(len, self._losses))
        while (n - len(self._losses[0])) * n_ranks >= self.n_inputs:
            n -= len(self._losses.pop(0))
            self._inputs.pop(0)

    @torch.no_grad()
    def _resample(self, trainer: Trainer, sae: SparseAutoencoder) -> None:
        min_frequency = self.min_frequency if self.scheme == "reinitialize" else 0.0
        dead = dead_latents(self._fired, self._n_counted, min_frequency).to(sae.device)
        all_dead = sae.parts.joined(dead)
        n_dead = int(all_dead.sum())
        if n_dead:
            # All ranks draw the same, but different devices may round differently.
            drawn = trainer.strategy.broadcast(self._draw(trainer, sae, n_dead).cpu())
            place = sae.parts.own(all_dead.cumsum(0) - 1)[dead]  # among those of all parts
            own = drawn[place.cpu()]
            if sae.W_dec.dtype == torch.float64:  # where float32 is not of norm 1, as on resume
                own = unit_rows(own.double())
            self._replace(sae, dead, own.to(sae.device))
            vectors = [getattr(sae, name) for name in sae.fresh_latent()]
            for weight, axis in ((sae.W_dec, 0), (sae.W_enc, 1), *((v, 0) for v in vectors)):
                reset_moments(trainer.optimizers, weight, dead, axis)
        for logger in trainer.loggers:  # self.log would drop values between its intervals
            logger.log_metrics({"train/resampled": n_dead}, step=trainer.global_step - 1)

    def _draw(
        self, trainer: Trainer, sae: SparseAutoencoder, count: int
    ) -> Float[Tensor, "count d_in"]:
        if self.scheme == "reinitialize":
            return random_unit_rows(count, sae.d_in, generator=self._generator)
        inputs, losses = self._of_all(trainer, self._inputs), self._of_all(trainer, self._losses)
        seen = sae.encoder_input(sae.scaled(inputs.to(sae.device)))
        return sample_directions(seen, losses.to(sae.device), count, self._generator)

    def _of_all(self, trainer: Trainer, chunks: list[Tensor]) -> Tensor:
        """The latest inputs, or their errors, of all ranks: by batch, then by rank."""
        copies = copies_of(trainer)
        if copies.n > 1:
            gather, device = trainer.strategy.all_gather, trainer.strategy.root_device
            chunks = [gather(chunk.to(device), copies.group).flatten(0, 1) for chunk in chunks]
        return torch.cat(chunks)[-self.n_inputs :]

    def _replace(self, sae: SparseAutoencoder, dead: Tensor, directions: Tensor) -> None:
        rows = directions
        if sae.decoder_norm == "free":
            rows = directions * mean_norm(sae.W_dec[~dead], sae.parts)
        sae.W_dec[dead] = rows.to(sae.W_dec.dtype)
        if self.scheme == "loss_squared":
            rows = directions * self.encoder_scale * mean_norm(sae.W_enc.T[~dead], sae.parts)
        if not sae.tied:
            sae.W_enc.T[dead] = rows.to(sae.W_enc.dtype)
        for name, value in sae.fresh_latent().items():
            getattr(sae, name)[dead] = value
        sae.silent_for[dead] = 0


def _is_replaceable(sae: SparseAutoencoder) -> bool:
    """Whether all weights of a latent are trained parameters."""
    with without_drawing(sae):
        trained = {name for name, weight in sae.named_parameters() if weight.requires_grad}
    return ({"W_dec"} if sae.tied else {"W_enc", "W_dec", "b_enc"}) <= trained


def _out_of_order(
    every_n_steps: Length, window: Length, stop_after_step: Length | None = None
) -> list[str]:
    """Error messages about lengths that contradict each other, all in steps or all shares."""
    problems = []
    if window > every_n_steps:
        problems.append(
            f"Expected argument `window` to be at most `every_n_steps`={every_n_steps} but got "
            f"{window}."
        )
    if stop_after_step is not None and stop_after_step < every_n_steps:
        problems.append(
            f"Expected argument `stop_after_step` to be at least `every_n_steps`={every_n_steps}, "
            f"or null for no limit, but got {stop_after_step}."
        )
    return problems
