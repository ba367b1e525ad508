"""Many SAEs in one run: the language model runs once for all of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data.source import source_of
from lightning_sae.distributed.ranks import require_agreement, take_part, trainer_of
from lightning_sae.functional.sparse.memory import Workspace
from lightning_sae.side_by_side.checks import (
    require_hook,
    require_of_run,
    require_own_callbacks,
    require_supported,
)
from lightning_sae.side_by_side.descriptions import build_members, named
from lightning_sae.side_by_side.member import Member
from lightning_sae.side_by_side.optimizer import SideBySideOptimizer
from lightning_sae.training.finite import require_finite_weights
from lightning_sae.training.resuming import (
    Setting,
    Settings,
    compare_settings,
    note_settings,
    settings_of,
)
from lightning_sae.training.supported import require_supported_callbacks, require_supported_features


class SideBySide(LightningModule):
    """SAEs that are trained side by side on the same batches, each as if it were alone.

    Each member has its own weights, optimizer, schedule, callbacks, logs and count of steps. Its
    weights are, bit for bit, those of a run alone on the same batches, with the same seed and the
    same trainer. A member whose loss is not finite is stopped and reported, and the others go on.

    Members are described as in YAML, or given as objects::

        members:
          - name: relu
            hook_name: blocks.1.hook_resid_post  # if the data has several
            sae:
              class_path: lightning_sae.ReLUSAE
              init_args: {d_sae: 1024, lr: 1.0e-3}
            callbacks:
              - class_path: lightning_sae.callbacks.DecoderNormProjection
            sweep:
              l1_coefficient: [0.5, 1.0, 2.0]
              seed: [0, 1]

    makes six members, `relu-l1_coefficient=0.5-seed=0` and so on. A sweep lists values of `seed`,
    of `hook_name`, or of any argument of the SAE, and makes a member for each combination. Without
    a `seed`, the seed of the run draws the initial weights.

    All members share the batches, `trainer.max_steps`, accumulation, precision and devices. A
    checkpoint of the run holds all members.

    Args:
        members: Their descriptions: `name`, `sae` (`class_path` and `init_args`, or an SAE), and
            optionally `hook_name`, `seed`, `callbacks` (descriptions or callbacks) and `sweep`.
        d_in: Width of the activations, by hook if there are several; the command line takes it
            from the data.

    Raises:
        ValueError: If a description does not fit, or two members share a name; before training,
            if one does not fit the data, or if it has a precision or strategy that is not
            supported. The message names the member.
        FloatingPointError: When the last member stops.
    """

    def __init__(
        self,
        # Not a more exact type, for which the command line would instantiate the contents.
        members: list[dict],
        d_in: int | dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.members = build_members(members, d_in)
        self.saes = nn.ModuleList(member.sae for member in self.members)
        _share_workspaces(self.members)

    def __getitem__(self, name: str) -> SparseAutoencoder:
        """The SAE of a member."""
        return next(member.sae for member in self.members if member.name == name)

    @property
    def active(self) -> list[Member]:
        """Members that have not stopped."""
        return [member for member in self.members if member.stopped is None]

    @property
    def stopped(self) -> dict[str, str]:
        """Members that have stopped, and the reasons."""
        return {member.name: member.stopped for member in self.members if member.stopped}

    def _pass_on(self, hook: str, *batch: Any) -> None:
        """Call a hook of each member, with its rows if the hook is of a batch."""
        for member in self.active:
            its = (member.rows(batch[0]), *batch[1:]) if batch else ()
            member.call(hook, *its)

    def give_each(self, callbacks: Callable[[], Sequence[Callback]]) -> None:
        """Add new callbacks to each member; the function is called once for each."""
        for member in self.members:
            member.callbacks += callbacks()

    # Setting up.

    @override
    def configure_callbacks(self) -> list[Callback]:
        """A callback for members' hooks that Lightning calls too late on a module."""
        given: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        require_supported_callbacks(given)
        for callback in given:
            require_of_run(callback)
        return [_MembersHooks()]

    @override
    def setup(self, stage: str) -> None:
        """Attach the members and set up each of them."""
        require_supported(self.trainer)
        require_supported_features(self, self.trainer, stage)
        parts = {member.name: member.parts() for member in self.members}
        require_agreement(self.trainer, parts)  # members compare the rest, one after another
        for member in self.members:
            with named(member.name):
                require_hook(member, source_of(self.trainer))
                require_own_callbacks(member, stage)
                member.setup(self.trainer, stage)

    @override
    def configure_optimizers(self) -> Optimizer:
        """The optimizers of all members, as one.

        Raises:
            ValueError: If there is no trainer.
        """
        if trainer_of(self) is None:
            raise ValueError(
                "SAEs side by side need a Lightning trainer, which they share, but there is none: "
                "use `Trainer.fit`, or in a loop of your own train each SAE by itself."
            )
        for member in self.members:
            with named(member.name):
                member.configure_optimizers()
        return SideBySideOptimizer(self.members)

    # Training. Lightning counts and calls hooks; each member does what Lightning would do for it.

    @override
    def on_train_start(self) -> None:
        """Start the members. They exchange gradients themselves, so DDP must not."""
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy.model.require_backward_grad_sync = False  # type: ignore
        self._pass_on("on_train_start")

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for member in self.active:
            member.start_batch(batch, batch_idx)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the gradients of one member after another, so only one graph is in memory.

        Returns:
            The mean of the members' losses, for display.

        Raises:
            FloatingPointError: If no member is left.
        """
        losses = []
        for member in self.active:
            try:
                losses.append(member.forward_and_backward(batch, batch_idx))
            except FloatingPointError as error:
                self._stop(member, error)
        self._require_a_member()
        loss = torch.stack([loss.float() for loss in losses]).mean()
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("members", float(len(losses)), prog_bar=True, logger=False)
        return loss

    def stop_what_is_not_finite(self) -> None:
        """Stop members whose weights are not finite."""
        for member in self.active:
            try:
                require_finite_weights(member.sae, self.trainer.global_step)
            except FloatingPointError as error:
                self._stop(member, error)
        self._require_a_member()

    def _require_a_member(self) -> None:
        if not self.active:
            raise FloatingPointError(f"All members have stopped. {_reasons(self.stopped)}")

    def _stop(self, member: Member, error: FloatingPointError) -> None:
        member.stop(error)
        rank_zero_warn(f"Member `{member.name}` has stopped, the others go on. {error}")

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing: members have computed their gradients."""

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: members do it themselves."""

    @override
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """A step of each member."""
        optimizer_closure()
        for member in self.active:
            member.step()

    def end_batch(self, batch: Any, batch_idx: int) -> None:
        """End the batch of each member, and write logs every `log_every_n_steps`."""
        steps, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore
        for member in self.active:
            member.end_batch(batch, batch_idx)
            if every and steps % every == 0:
                member.trainer.write_logs(steps - 1)

    # Held-out data.

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The outputs of the members by name."""
        return {m.name: m.sae.validation_step(m.rows(batch), batch_idx) for m in self.active}

    @override
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The outputs of the members by name."""
        return {m.name: m.sae.test_step(m.rows(batch), batch_idx) for m in self.active}

    @override
    def on_validation_batch_end(self, outputs: Any, batch: Any, *index: int) -> None:
        for member in self.active:
            its = outputs[member.name], member.rows(batch)
            member.call("on_validation_batch_end", *its, *index)

    @override
    def on_test_batch_end(self, outputs: Any, batch: Any, *index: int) -> None:
        for member in self.active:
            its = outputs[member.name], member.rows(batch)
            member.call("on_test_batch_end", *its, *index)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Latents of each member, for its callbacks; by name, if predictions are kept."""
        found: dict[str, Tensor] = {}
        kept = self.trainer.predict_loop.return_predictions
        for member in self.active:
            rows = member.rows(batch)
            latents = member.sae.predict_step(rows, batch_idx)
            # Not in the hook of the run, where the latents of all members would be in memory.
            # In a separate run, the hook is called outside of the autocast context.
            with torch.autocast(self.device.type, enabled=False):
                member.call("on_predict_batch_end", latents, rows, batch_idx)
            found |= {member.name: latents} if kept else {}
        return found

    @override
    def on_validation_epoch_end(self) -> None:
        self._pass_on("on_validation_epoch_end")
        for member in self.active:
            member.trainer.write_logs(max(0, self.trainer.global_step - 1))

    @override
    def on_test_epoch_end(self) -> None:
        self._pass_on("on_test_epoch_end")
        for member in self.active:
            member.trainer.write_logs(self.trainer.global_step)

    @override
    def teardown(self, stage: str) -> None:
        for member in self.members:
            member.teardown(stage)

    # Checkpoints.

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of members other than weights and optimizer."""
        self.stop_what_is_not_finite()
        checkpoint["members"] = [member.state_dict() for member in self.members]
        checkpoint["ranks"] = self.trainer.world_size
        note_settings(checkpoint, self._settings())

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of members.

        Raises:
            ValueError: If the checkpoint is not of a run of the same members, or the run cannot go
                on with other settings.
        """
        self._take_part(checkpoint)
        names = [member.name for member in self.members]
        saved = [own["name"] for own in checkpoint.get("members", [])]
        if names != saved:
            raise ValueError(
                f"Expected a checkpoint of the members {', '.join(names)}, in this order, but it "
                f"holds {', '.join(saved) or 'none'}: resume with the `members` of the run."
            )
        weights = checkpoint["state_dict"]
        self._require_no_other(weights)
        for i, (member, own) in enumerate(zip(self.members, checkpoint["members"], strict=True)):
            prefix = f"saes.{i}."
            its = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
            with named(member.name):
                member.load_state_dict({**own, "state_dict": its, "global_step": 0})
        compare_settings(checkpoint, self._settings(), self.trainer)

    def _require_no_other(self, weights: dict[str, Tensor]) -> None:
        own = tuple(f"saes.{i}." for i in range(len(self.members)))
        others = sorted(name for name in weights if not name.startswith(own))
        if others:
            raise ValueError(
                f"Expected a checkpoint of the weights of {len(self.members)} members but it also "
                f"has {', '.join(others)}: give another `ckpt_path`."
            )

    def _settings(self) -> Settings:
        seeds = {f"members.{m.name}.seed": Setting(m.seed, False) for m in self.members}
        saes = {f"members.{member.name}.": member.sae for member in self.members}
        callbacks = {f"members.{member.name}.": member.callbacks for member in self.members}
        own = self.trainer.callbacks  # type: ignore[attr-defined]
        return seeds | settings_of(self.trainer, saes, {"": own, **callbacks})

    def _take_part(self, checkpoint: dict[str, Any]) -> None:
        among = self.trainer.global_rank, self.trainer.world_size
        if self.trainer.state.fn == "fit" and among[0] > 0 and checkpoint.get("ranks") == among[1]:
            take_part(Path(self.trainer.ckpt_path), among[0], checkpoint)  # type: ignore[arg-type]


def _passing_on(hook: str) -> Callable[..., None]:
    """A method that calls a hook of each member."""

    def method(self: SideBySide, *batch: Any) -> None:
        self._pass_on(hook, *batch)

    method.__name__, method.__qualname__ = hook, f"SideBySide.{hook}"
    method.__doc__ = f"Call `{hook}` of each member: of its callbacks, then of its SAE."
    return method


for _hook in (
    "on_fit_start",
    "on_fit_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_batch_start",
    "on_test_end",
    "on_predict_start",
    "on_predict_epoch_start",
    "on_predict_batch_start",
    "on_predict_epoch_end",
    "on_predict_end",
):
    setattr(SideBySide, _hook, _passing_on(_hook))


class _MembersHooks(Callback):
    """Calls members' hooks that Lightning calls only on callbacks, or on a module too late.

    Lightning calls callbacks that save checkpoints after all others but before the module. What
    members do at the end of a step, a validation or the training has to be in the checkpoint.
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning skips batches that are None. The trainer may have gone on to another module.
        if batch is not None and isinstance(pl_module, SideBySide):
            pl_module.end_batch(batch, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass_on(pl_module, "on_validation_end", to_saes=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, SideBySide):
            pl_module.stop_what_is_not_finite()
        self._pass_on(pl_module, "on_train_end", to_saes=True)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass_on(pl_module, "on_sanity_check_start")

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass_on(pl_module, "on_sanity_check_end")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._pass_on(pl_module, "on_exception", exception)

    @staticmethod
    def _pass_on(pl_module: LightningModule, hook: str, *args: Any, to_saes: bool = False) -> None:
        if not isinstance(pl_module, SideBySide):
            return
        for member in pl_module.active:
            if to_saes:
                member.call(hook, *args)
            elif member.is_set_up:
                member.call_callbacks(hook, *args)


def _share_workspaces(members: list[Member]) -> None:
    """Let members of the same size share scratch memory, as they take turns."""
    shared: dict[tuple[int, int | None], Workspace] = {}
    for sae in (member.sae for member in members):
        sae.layout.workspace = shared.setdefault((sae.d_sae, sae.chunk_rows), Workspace())


def _reasons(stopped: dict[str, str]) -> str:
    return " ".join(f"`{name}`: {reason}" for name, reason in stopped.items())
