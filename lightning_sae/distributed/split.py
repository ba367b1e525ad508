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
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from typing_extensions import Protocol, override, runtime_checkable

from lightning_sae.checkpoints import AtomicCheckpointIO
from lightning_sae.checks import require_positive
from lightning_sae.distributed.parts import ALONE, Parts
from lightning_sae.distributed.undrawn import drawn_for, without_drawing
from lightning_sae.distributed.waiting import told_of_waiting


class Copies(NamedTuple):
    """Copies of a dictionary, each trained on batches of its own.

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
        kwargs: Arguments of Lightning's `DDPStrategy`, such as `timeout`, how long devices wait for
            each other.

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
        with told_of_waiting(self._timeout):
            super().setup_environment()
            self._meet()

    def _meet(self) -> None:
        n_parts = _agreed(self.world_size if self.n_parts is None else self.n_parts)
        if self.world_size % n_parts:
            raise ValueError(
                f"Expected argument `parts` to divide the {self.world_size} devices of the run but "
                f"got {n_parts}: choose another `parts`, or other `trainer.devices`."
            )
        dealt = getattr(self.lightning_module, "deals_latents", False)
        if self.parts.n == n_parts and n_parts > 1:  # by an earlier run of this trainer
            self.parts = Parts(self.parts.group, dealt)
            return
        ranks = torch.arange(self.world_size).view(-1, n_parts)
        own, across = (
            distributed.new_subgroups_by_enumeration(groups.tolist(), timeout=self._timeout)[0]
            for groups in (ranks, ranks.T)
        )
        self.parts = Parts(own, dealt) if n_parts > 1 else ALONE
        self.copies = Copies(self.global_rank // n_parts, len(ranks), across)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of a distributed sampler: one replica for each copy."""
        return {"num_replicas": self.copies.n, "rank": self.copies.own}

    @override
    def setup(self, trainer: Trainer) -> None:
        """As `DDPStrategy`, but outside of `fit` without sending the weights of rank 0 to all."""
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
        """Move a batch to the device, and give all parts of a copy the batch of the first part.

        They read the same text, but language models on several devices may differ by rounding.
        """
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return self.parts.as_first(batch) if isinstance(batch, Tensor) else batch

    # Checkpoints are whole.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """State of the module with the whole dictionary, in the process that writes it."""
        state = super().lightning_module_state_dict()
        axes = self._axes()
        return {k: self._whole(v, axes.get(k)) for k, v in state.items()}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of the optimizer for the whole dictionary, in the process that writes it."""
        found: Any = super().optimizer_state(optimizer)
        return {**found, "state": self._each_moment(optimizer, found["state"], self._whole)}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; if it can be, only what this device needs of weights and moments."""
        checkpoint_io = self.checkpoint_io
        if isinstance(checkpoint_io, AtomicCheckpointIO):
            checkpoint_io.mapped = self.parts.n > 1
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this device's part of the weights of a checkpoint."""
        axes, whole = self._axes(), checkpoint["state_dict"]
        # As views: the module copies them.
        own = {k: self.parts.cut(v, axes[k]) if k in axes else v for k, v in whole.items()}
        super().load_model_state_dict({**checkpoint, "state_dict": own}, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this device's part of the optimizer states of a checkpoint."""
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

    def _whole(self, own: Tensor, axis: int | None) -> Tensor | None:
        if axis is None:
            return own
        # Only the first copy is saved.
        return self.parts.whole(own, axis) if self.copies.own == 0 else None

    def _own(self, whole: Tensor, axis: int | None) -> Tensor:
        # Copied, because the whole may be that in the file.
        return (whole if axis is None else self.parts.cut(whole, axis)).clone()

    def _each_moment(self, optimizer: Optimizer, state: Any, convert: Any) -> dict[int, Any]:
        """The state of each weight, with its tensors converted by their axis of latents."""
        axes, module = self._axes(), cast(nn.Module, self.lightning_module)
        of_weight = {id(w): axes[name] for name, w in module.named_parameters() if name in axes}
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        return {
            i: {
                name: convert(value, of_weight.get(id(weights[i])) if value.dim() else None)
                if isinstance(value, Tensor)
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
    """Reduce the weights of a whole module to those of its part, and return the axes of latents.

    Of weights that are not drawn yet, the part alone is drawn. Weights that are not split, such as
    `b_dec`, become those of the first part.
    """
    with without_drawing(module):
        axes = cast(HasLatents, module).latent_axes()
    of_own = drawn_for(module, parts.latents(cast(HasLatents, module).d_sae))
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        tensor.grad = None
        if name in of_own:
            continue
        if name in axes:
            tensor.data = parts.cut(tensor.data, axes[name]).clone()
        else:
            tensor.data.copy_(parts.as_first(tensor.data.to(device)))
    return axes


def require_whole(parts: Parts) -> None:
    """Raise a ValueError if an SAE is already a part of a dictionary split in another way."""
    if parts.n > 1:
        raise ValueError(
            "Expected a whole SAE, or one of as many parts as `trainer.strategy` has, but got part "
            f"{parts.index} of {parts.n}: load the exported SAE or a checkpoint, which are whole."
        )


def whole_shapes(module: nn.Module, parts: Parts) -> dict[str, tuple[int, ...]]:
    """Shapes, over all parts, of the weights that are split."""
    if parts.n == 1:
        return {}
    axes = cast(HasLatents, module).latent_axes()
    shapes = {k: list(v.shape) for k, v in module.state_dict().items() if k in axes}
    for name, shape in shapes.items():
        shape[axes[name]] *= parts.n
    return {name: tuple(shape) for name, shape in shapes.items()}


def norm_over_parts(
    gradients: Mapping[str, Tensor], axes: Mapping[str, int], parts: Parts
) -> Float[Tensor, ""]:
    """The joint Euclidean norm of gradients, of which those with an axis of latents are split."""
    own = [gradient.movedim(axes[k], 0) for k, gradient in gradients.items() if k in axes]
    same = [gradient for k, gradient in gradients.items() if k not in axes]
    squares = nn.utils.get_total_norm(own).square()
    return (parts.sum(squares) + nn.utils.get_total_norm(same).to(squares).square()).sqrt()


# A name for `Trainer(strategy=...)` and `--trainer.strategy`, which Lightning makes lower case.
StrategyRegistry.register(
    SplitDictionary.__name__.lower(), SplitDictionary, "one dictionary over all devices", parts=None
)
