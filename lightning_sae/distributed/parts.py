"""The parts of a dictionary whose latents are split over several devices.

Each device has the encoder columns, decoder rows, biases, thresholds, moments and counts of its own
latents, and computes with them as if they were all. What needs all latents is exchanged:

- a reconstruction is the sum of the parts' reconstructions (`Parts.sum`). Each part's gradient is
  that of the sum, so nothing is sent back;
- `b_dec` is the same on all devices. As the decoder's bias it gets the same gradient everywhere. As
  the encoder's origin it gets a gradient from each part's latents, and these are added
  (`Parts.shared`).

These are the two conjugate operators of Shoeybi et al., Megatron-LM (2019), section 3.
"""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, distributed
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Parts:
    """The devices that hold a dictionary together, as seen from one of them.

    All of them must call these methods in the same order. With one part, which is then the whole,
    each method returns its argument.

    Args:
        group: The process group of these devices; None for one part.
        dealt: Whether latents are dealt to the parts in turn, for an SAE whose first latents are
            active more often. Otherwise part i of n has the i-th n-th of them.

    Attributes:
        n: Number of parts.
        index: The part that this device holds.
    """

    def __init__(self, group: Any = None, dealt: bool = False) -> None:
        self.group, self.dealt = group, dealt
        self.n = 1 if group is None else distributed.get_world_size(group)
        self.index = 0 if group is None else distributed.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parts":
        return self  # a process group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.n > 1:
            raise ValueError(
                f"Expected a whole SAE to pickle but got part {self.index} of {self.n}: have all "
                "processes call `save_pretrained`, and load what it writes."
            )
        return vars(self)

    # Operations with a gradient.

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all parts; its gradient is that of each summand."""
        return value if self.n == 1 else _Sum.apply(value, self.group)

    def shared(self, value: Tensor) -> Tensor:
        """A value that is equal on all parts and used by each; its gradient is summed over them."""
        return value if self.n == 1 else _Shared.apply(value, self.group)

    # Operations without a gradient.

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all parts, which are equally large."""
        return value if self.n == 1 else self._reduced(value, distributed.ReduceOp.SUM) / self.n

    def most(self, value: Tensor) -> Tensor:
        """The largest of all parts, elementwise."""
        return value if self.n == 1 else self._reduced(value, distributed.ReduceOp.MAX)

    def least(self, value: Tensor) -> Tensor:
        """The smallest of all parts, elementwise."""
        return value if self.n == 1 else self._reduced(value, distributed.ReduceOp.MIN)

    def any(self, *flags: bool, device: torch.device) -> tuple[bool, ...]:
        """Whether each flag is set on any part."""
        if self.n == 1:
            return flags
        found = self.most(torch.tensor(flags, dtype=torch.int32, device=device))
        return tuple(bool(flag) for flag in found)

    def gathered(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "parts ..."]:
        """The tensors of all parts, in their order."""
        if self.n == 1:
            return values.unsqueeze(0)
        return torch.stack(self._of_each(values))

    def joined(self, f: Shaped[Tensor, "... own"]) -> Shaped[Tensor, "... d_sae"]:
        """The values of all latents from those of each part."""
        if self.n == 1:
            return f
        of_each = self._of_each(f)
        return torch.stack(of_each, -1).flatten(-2) if self.dealt else torch.cat(of_each, -1)

    def _of_each(self, value: Tensor) -> list[Tensor]:
        value = value.detach().contiguous()
        found = [torch.empty_like(value) for _ in range(self.n)]
        distributed.all_gather(found, value, group=self.group)
        return found

    def own(self, f: Shaped[Tensor, "... d_sae"]) -> Shaped[Tensor, "... own"]:
        """The values of this part's latents, from those of all."""
        return f if self.n == 1 else self.cut(f, -1)

    def as_first(self, value: Tensor) -> Tensor:
        """The tensor that the first part has."""
        if self.n == 1:
            return value
        value = value.contiguous() if self.index == 0 else torch.empty_like(value.contiguous())
        distributed.broadcast(value, group_src=0, group=self.group)
        return value

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        value = value.detach().clone()
        distributed.all_reduce(value, op=operation, group=self.group)
        return value

    # Tensors of all latents and of this part.

    def latents(self, n_latents: int) -> range:
        """This part's latents, of `n_latents` in all."""
        if self.dealt:
            return range(self.index, n_latents, self.n)
        size = n_latents // self.n
        return range(self.index * size, (self.index + 1) * size)

    def indices(self, n_latents: int, device: torch.device) -> Int[Tensor, " own"]:
        """The same as a tensor."""
        own = self.latents(n_latents)
        return torch.arange(own.start, own.stop, own.step, device=device)

    def cut(self, whole: Tensor, axis: int) -> Tensor:
        """This part of a tensor of all latents, as a view."""
        own = self.latents(whole.shape[axis])
        return whole.movedim(axis, 0)[own.start : own.stop : own.step].movedim(0, axis)

    def picked(self, own: Tensor, latents: Tensor, n_latents: int) -> Tensor:
        """Gather the rows of some latents from the tables of all parts; the same on all devices."""
        if self.n == 1:
            return own[latents]
        of_own = self.latents(n_latents)
        place = latents - of_own.start
        mine = (place >= 0) & (latents < of_own.stop) & (place % of_own.step == 0)
        found = own.new_zeros(len(latents), *own.shape[1:])
        found[mine] = own.detach()[place[mine] // of_own.step]
        return self._reduced(found, distributed.ReduceOp.SUM)

    def whole(self, own: Tensor, axis: int) -> Tensor | None:
        """The tensor of all latents, in the memory of the first part's CPU; None on the others.

        It is sent part by part, so that the device of the first never holds more than two parts.
        """
        own = own.detach()
        if self.n == 1:
            return own
        ordered = own.movedim(axis, 0).contiguous()
        if self.index > 0:
            distributed.send(ordered, group_dst=0, group=self.group)
            return None
        size = (len(ordered), self.n) if self.dealt else (self.n, len(ordered))
        all_rows = torch.empty(*size, *ordered.shape[1:], dtype=ordered.dtype)
        found = all_rows.transpose(0, 1) if self.dealt else all_rows
        found[0].copy_(ordered)
        for index in range(1, self.n):
            received = torch.empty_like(ordered)
            distributed.recv(received, group_src=index, group=self.group)
            found[index].copy_(received)
        return all_rows.flatten(0, 1).movedim(0, axis)


ALONE = Parts()
"""The parts of a dictionary that is not split."""


class _Sum(Function):
    @staticmethod
    def forward(_ctx: Any, value: Tensor, group: Any) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return dtotal, None


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor, None]:
        total = dvalue.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total, None
