"""A strategy of Lightning with which several devices hold one dictionary, each a part of it.

Devices form a grid of copies by parts. Those of a row hold one copy of the dictionary together, and
are given the same batch; those of a column hold the same part of it, and average its gradients over
their batches, as with `ddp`.

`ModelParallelStrategy` of Lightning is not used. It wants parameters that are `DTensor`s, on which
the sparse products and the fused optimizer step of this package do not work, and saves and averages
by way of them. Here each parameter is an ordinary tensor, of its own latents alone, and so are its
gradient and its moments: all that works with `ddp` works in the same way.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.checks import require_positive
from lightning_sae.distributed.parts import ALONE, Parts


class Copies(NamedTuple):
    """The copies of a dictionary that are trained on different batches.

    Attributes:
        own: The copy that this process holds, or holds a part of.
        n: Number of copies.
        group: The processes with the same part of each copy; None for all processes.
    """

    own: int
    n: int
    group: Any = None


def copies_of(trainer: Trainer) -> Copies:
    """The copies in a run: one for each rank, unless several hold one together."""
    strategy = trainer.strategy
    if isinstance(strategy, SplitDictionary):
        return strategy.copies
    return Copies(trainer.global_rank, trainer.world_size)


def parts_of(trainer: Trainer) -> Parts:
    """The parts of a copy in a run: one, unless the strategy is `SplitDictionary`."""
    strategy = trainer.strategy
    return strategy.parts if isinstance(strategy, SplitDictionary) else ALONE


@runtime_checkable
class HasLatents(Protocol):
    """A module with latents.

    Attributes:
        d_sae: Number of latents, over all parts.
        may_be_split: Whether it exchanges what it needs of other latents through `Parts`.
    """

    d_sae: int
    may_be_split: bool

    def latent_axes(self) -> dict[str, int]:
        """The axis of the latents, by name, of each parameter and buffer that has one."""


class SplitDictionary(DDPStrategy):
    """Split the latents of an SAE over several devices, for dictionaries that one cannot hold.

    With n devices and p parts there are n / p copies of the dictionary. The devices of a copy hold
    F / p latents each and are given the same batch; different copies get different batches and
    average their gradients. Results are those of one device up to rounding. Checkpoints and
    exported SAEs are whole, and may be resumed with another number of parts, or on one device.

    After `fit`, the SAE of each process is its part. `save_pretrained` has to be called in all
    processes; it gathers the weights and writes them in one.

    Example::

        trainer = Trainer(strategy=SplitDictionary(parts=4), devices=8, max_steps=20_000)
        trainer.fit(TopKSAE(d_in=4096, d_sae=2**20, k=64), data)

    Args:
        parts: Number of parts; all devices by default. Neighbouring ranks hold the parts of a copy.
        kwargs: Arguments of Lightning's `DDPStrategy`.

    Raises:
        ValueError: If `parts` does not divide the number of devices or, when fitting starts, the
            number of latents.
    """

    def __init__(self, parts: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_positive(parts=1 if parts is None else parts)
        self.n_parts = parts
        self.parts = ALONE
        self.copies = Copies(0, 1)

    @override
    def setup_environment(self) -> None:
        """Start the processes' communication, in the two dimensions of the grid."""
        super().setup_environment()
        n_parts = _agreed(self.world_size if self.n_parts is None else self.n_parts)
        if self.world_size % n_parts:
            raise ValueError(
                f"Expected argument `parts` to divide the {self.world_size} devices of the run but "
                f"got {n_parts}: choose another `parts`, or other `trainer.devices`."
            )
        if self.parts.n == n_parts and n_parts > 1:  # by an earlier run of this trainer
            return
        ranks = torch.arange(self.world_size).view(-1, n_parts)
        own = distributed.new_subgroups_by_enumeration(ranks.tolist())[0]
        across = distributed.new_subgroups_by_enumeration(ranks.T.tolist())[0]
        self.parts = Parts(own) if n_parts > 1 else ALONE
        self.copies = Copies(self.global_rank // n_parts, len(ranks), across)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data is shared out among the copies."""
        return {"num_replicas": self.copies.n, "rank": self.copies.own}

    @override
    def setup(self, trainer: Trainer) -> None:
        """As `DDPStrategy`, which outside of `fit` would give all devices the weights of one."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    @override
    def configure_ddp(self) -> None:
        """Average gradients over the copies, if there are several."""
        if self.copies.n > 1:
            self._ddp_kwargs["process_group"] = self.copies.group
            super().configure_ddp()

    @override
    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """The batch of the first part, for all parts of a copy.

        They should have the same batch already. That they have it bit for bit does not depend on
        the data, nor on whether a language model gives the same on each device.
        """
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return self.parts.as_first(batch) if isinstance(batch, Tensor) else batch

    # Checkpoints are whole.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of the whole dictionary, in the process that writes it."""
        state = super().lightning_module_state_dict()
        axes = self._axes()
        return {k: self._whole(v, axes[k]) if k in axes else v for k, v in state.items()}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Of the whole dictionary, in the process that writes it."""
        found: Any = super().optimizer_state(optimizer)
        return {**found, "state": self._each_moment(optimizer, found["state"], self._whole)}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the own part of a checkpoint."""
        axes, whole = self._axes(), checkpoint["state_dict"]
        own = {k: self._own(v, axes[k]) if k in axes else v for k, v in whole.items()}
        super().load_model_state_dict({**checkpoint, "state_dict": own}, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the own part of a checkpoint."""
        states = [
            {**saved, "state": self._each_moment(optimizer, saved["state"], self._own)}
            for optimizer, saved in zip(
                self.optimizers, checkpoint["optimizer_states"], strict=True
            )
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def _axes(self) -> dict[str, int]:
        if self.parts.n == 1:
            return {}
        return cast(HasLatents, self.lightning_module).latent_axes()

    def _whole(self, own: Tensor, axis: int) -> Tensor | None:
        # Only the first copy is saved.
        return self.parts.whole(own, axis) if self.copies.own == 0 else None

    def _own(self, whole: Tensor, axis: int) -> Tensor:
        return self.parts.cut(whole, axis).clone()

    def _each_moment(self, optimizer: Optimizer, state: Any, convert: Any) -> dict[int, Any]:
        """The state of each weight, with all that has its axis of latents converted."""
        axes, module = self._axes(), cast(nn.Module, self.lightning_module)
        of_weight = {id(w): axes[name] for name, w in module.named_parameters() if name in axes}
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        return {
            i: {
                name: convert(value, of_weight[id(weights[i])])
                if id(weights[i]) in of_weight and isinstance(value, Tensor) and value.dim()
                else value
                for name, value in moments.items()
            }
            for i, moments in state.items()
        }


def _agreed(n_parts: int) -> int:
    of_all: list[int] = [0] * distributed.get_world_size()
    distributed.all_gather_object(of_all, n_parts)
    if len({*of_all}) > 1:
        raise ValueError(
            "Expected argument `parts` to be the same on all ranks but, from rank 0 on, got "
            f"{', '.join(map(str, of_all))}: start them all with the same arguments."
        )
    return n_parts


@torch.no_grad()
def keep_own_part(module: nn.Module, parts: Parts, device: torch.device) -> dict[str, int]:
    """Replace the weights of a whole module by those of a part, and return the axes of latents.

    What all parts have, such as `b_dec`, becomes that of the first.
    """
    axes = cast(HasLatents, module).latent_axes()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        tensor.grad = None
        if name in axes:
            tensor.data = parts.cut(tensor.data, axes[name]).clone()
        else:
            tensor.data.copy_(parts.as_first(tensor.data.to(device)))
    return axes
