"""One of several SAEs in a run, trained as by Lightning's automatic optimization."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.side_by_side.member_trainer import MemberTrainer


class Member:
    """An SAE with the parts of a separate run, whose hooks are called in Lightning's order.

    Args:
        name: The member's name.
        sae: Its SAE.
        callbacks: Its callbacks.
        hook_name: Its hook; None if the data has only one.
        seed: The seed of its initial weights; None for that of the run.

    Attributes:
        stopped: Why it was stopped; None if it is active.
        trainer: The member's view of the run's trainer, set in `setup`.
    """

    trainer: MemberTrainer
    optimizer: Optimizer
    scheduler: Any

    def __init__(
        self,
        name: str,
        sae: SparseAutoencoder,
        callbacks: Sequence[Callback] = (),
        hook_name: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.name, self.sae, self.hook_name, self.seed = name, sae, hook_name, seed
        self.callbacks = list(callbacks)
        self.stopped: str | None = None
        self.stopped_at: int | None = None
        self._outputs: dict[str, Any] = {}

    @property
    def is_set_up(self) -> bool:
        """Whether the member is attached to a run."""
        return "trainer" in vars(self)

    def rows(self, batch: Any) -> Any:
        """The member's part of a batch of all hooks.

        Raises:
            ValueError: If the batch does not have the member's hook.
        """
        if not isinstance(batch, dict):
            return batch
        if self.hook_name not in batch:
            raise ValueError(
                f"Expected a batch with the hook of member `{self.name}`, {self.hook_name}, but "
                f"got {', '.join(map(str, batch))}: set the member's `hook_name` to one of these."
            )
        return batch[self.hook_name]

    def parts(self) -> dict[str, str | None]:
        """Names of the member's parts, to compare them between ranks."""
        kinds = ", ".join(type(callback).__name__ for callback in self.callbacks)
        return {"sae": type(self.sae).__name__, "hook_name": self.hook_name, "callbacks": kinds}

    # The parts of a run, in Lightning's order: callbacks first, then the SAE.

    def setup(self, run: Trainer, stage: str) -> None:
        """Attach the member to a run."""
        self.trainer = MemberTrainer(run, self.name, self.sae, self.callbacks, self.hook_name)
        self.sae.trainer = self.trainer
        # As in Lightning, they replace those of the same class. `trainer.callbacks` is this list.
        brought = self.sae.configure_callbacks()
        kinds = {type(callback) for callback in brought}
        self.callbacks[:] = [each for each in self.callbacks if type(each) not in kinds] + brought
        # Replace methods that only work in a module that Lightning itself calls.
        for part in (self.sae, *self.callbacks):
            vars(part).update(log=self.trainer.log, log_dict=self.trainer.log_dict)
        for callback in self.callbacks:
            callback.setup(self.trainer, self.sae, stage)
        self.sae.setup(stage)

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook of the callbacks and of the SAE."""
        self.call_callbacks(hook, *args)
        getattr(self.sae, hook)(*args)

    def call_callbacks(self, hook: str, *args: Any) -> None:
        """Call a hook of the callbacks."""
        for callback in self.callbacks:
            getattr(callback, hook)(self.trainer, self.sae, *args)

    def teardown(self, stage: str) -> None:
        """Detach the member, and close its logs."""
        for callback in self.callbacks:
            callback.teardown(self.trainer, self.sae, stage)
        self.sae.teardown(stage)
        self.trainer.close()
        for part in (self.sae, *self.callbacks):
            for name in ("log", "log_dict"):
                vars(part).pop(name, None)

    def configure_optimizers(self) -> None:
        """Create the optimizer and its schedule.

        Raises:
            ValueError: If the SAE does not have a single optimizer, with at most one schedule that
                is stepped with it.
        """
        found: Any = self.sae.configure_optimizers()
        found = {"optimizer": found} if isinstance(found, Optimizer) else found
        schedule = found.get("lr_scheduler") if isinstance(found, dict) else {"interval": None}
        if schedule is not None and (schedule["interval"], schedule.get("frequency", 1)) != (
            "step",
            1,
        ):
            raise ValueError(
                "Expected `configure_optimizers` to give one optimizer, and a schedule with "
                f"`interval='step'` or none, but got {found}."
            )
        self.optimizer = found["optimizer"]
        self.scheduler = None if schedule is None else schedule["scheduler"]
        self.trainer.optimizers = [self.optimizer]

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Call the hooks before a batch."""
        self.call_callbacks("on_train_batch_start", self.rows(batch), batch_idx)
        response: Any = self.sae.on_train_batch_start(self.rows(batch), batch_idx)
        if response == -1:
            raise ValueError(
                "Expected `on_train_batch_start` of an SAE side by side to return nothing but got "
                "-1, which would end the epoch of all members: train this SAE alone."
            )

    def forward_and_backward(self, batch: Any, batch_idx: int) -> Float[Tensor, ""]:
        """Loss and gradients of a batch, or of a micro-batch if gradients are accumulated."""
        sae, share = self.sae, self.trainer.accumulate_grad_batches
        outputs = sae.training_step(self.rows(batch), batch_idx)
        loss = outputs["loss"] / share
        # In a separate run, this is outside of the autocast context.
        with torch.autocast(sae.device.type, enabled=False):
            if batch_idx % share == 0:
                self.call("on_before_zero_grad", self.optimizer)
                sae.optimizer_zero_grad(self.trainer.current_epoch, batch_idx, self.optimizer)
            self.call("on_before_backward", loss)
            sae.backward(loss)
            self.call("on_after_backward")
        self._outputs = {**outputs, "loss": loss.detach()}
        return self._outputs["loss"]

    def step(self) -> None:
        """A step of the optimizer and its schedule, with the gradients of all ranks."""
        if self.trainer.world_size > 1:
            self._average_gradients()
        self.call("on_before_optimizer_step", self.optimizer)
        self.sae.configure_gradient_clipping(
            self.optimizer,
            gradient_clip_val=self.trainer.gradient_clip_val,
            gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
        )
        self.optimizer.step()
        if self.scheduler is not None:
            self.sae.lr_scheduler_step(self.scheduler, None)

    def _average_gradients(self) -> None:
        """As DistributedDataParallel does, which cannot leave out a stopped member."""
        weights = [weight for weight in self.sae.parameters() if weight.requires_grad]
        for weight in weights:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            # In memory order, because tensors that are reduced must be contiguous.
            flat = gradient if gradient.is_contiguous() else gradient.mT.contiguous()
            mean = self.trainer.strategy.reduce(flat / self.trainer.world_size, reduce_op="sum")
            weight.grad = mean if gradient.is_contiguous() else mean.mT

    def end_batch(self, batch: Any, batch_idx: int) -> None:
        """Call the hooks after a batch."""
        self.call("on_train_batch_end", self._outputs, self.rows(batch), batch_idx)
        self._outputs = {}

    def stop(self, error: Exception) -> None:
        """Stop training this member; its weights stay those before the failed step."""
        self.stopped, self.stopped_at = str(error), self.trainer.global_step
        self.trainer.stopped_at = self.stopped_at
        self.call_callbacks("on_exception", error)
        self.optimizer.state.clear()
        self.optimizer.zero_grad()

    # Checkpoints.

    def optimizer_state(self) -> dict[str, Any]:
        """State of the optimizer and its schedule."""
        schedule = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "lr_scheduler": schedule}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["lr_scheduler"])

    def state_dict(self) -> dict[str, Any]:
        """The contents of a separate run's checkpoint, without weights and optimizer."""
        own: dict[str, Any] = {"hyper_parameters": dict(self.sae.hparams)}
        own["callbacks"] = {each.state_key: each.state_dict() for each in self.callbacks}
        self.call_callbacks("on_save_checkpoint", own)
        # Weights that are not finite are an error only if the member has not stopped.
        with suppress(*([] if self.stopped is None else [FloatingPointError])):
            self.sae.on_save_checkpoint(own)
        own.pop("settings", None)  # noted once, for the whole run
        return {**own, "name": self.name, "stopped": self.stopped, "stopped_at": self.stopped_at}

    def load_state_dict(self, own: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; `own` also has the weights, to compare shapes."""
        self.sae.on_load_checkpoint(own)
        self.call_callbacks("on_load_checkpoint", own)
        for callback in self.callbacks:
            if callback.state_key in own["callbacks"]:
                callback.load_state_dict(own["callbacks"][callback.state_key])
        self.stopped, self.stopped_at = own["stopped"], own["stopped_at"]
        self.trainer.stopped_at = self.stopped_at
