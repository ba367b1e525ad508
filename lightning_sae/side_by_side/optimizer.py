"""The optimizers of all members, as one optimizer for Lightning."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.side_by_side.member import Member


class SideBySideOptimizer(Optimizer):
    """Saves the state of the members' optimizers and schedules in a checkpoint.

    It takes no steps itself; each member steps its own optimizer.

    Args:
        members: The members, with their optimizers.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        super().__init__([p for member in members for p in member.sae.parameters()], {})

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states of the members, in order."""
        return {"members": [member.optimizer_state() for member in self.members]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of each member."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_optimizer_state(state)
